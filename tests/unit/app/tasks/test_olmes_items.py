"""Holds items read from OLMES' published requests to the scores of the suite `olmes`."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.data.tokenizer import HFTokenizer
from moe_app.evaluate.olmes import score_items
from moe_app.tasks.items import read_tasks
from moe_app.tasks.olmes_requests import read_items
from moe_app.tasks.rows import encode_pair, encode_tasks, score_task
from tests.unit.app.evaluate.make_olmes import OLMES_ITEMS, write_olmes
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

END = "<|endoftext|>"


def test_scores_are_those_of_the_suite(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(make_hf_tokenizer(tmp_path, [END], tokenizer_config={"eos_token": END}))
    write_olmes(tmp_path / "olmes")
    # As WinoGrande's: the answers differ in what stands before them.
    contexts = tmp_path / "olmes/winogrande/val_rc_5shot/requests.jsonl.gz"
    contexts.parent.mkdir(parents=True)
    records = [
        {
            "doc_id": 0,
            "idx": index,
            "label": 1,
            "request": {"context": f"the {name}", "continuation": " jumps"},
        }
        for index, name in enumerate(("dog", "quick fox"))
    ]
    contexts.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    paths = sorted((tmp_path / "olmes").rglob("*.gz"))
    assert len(paths) == 2 * len(OLMES_ITEMS) + 1
    for path in paths:
        tasks = read_tasks([f"named={path}"], limit=None)
        encoded = encode_tasks(tasks, tokenizer, max_length=64)
        # Log-probabilities without meaning, a function of the tokens.
        values = [random.Random(str(row.ids)).uniform(-9, -1) for row in encoded.rows]

        def log_probs(pairs: Sequence[tuple[str, str]]) -> list[float]:
            rows = [encode_pair(tokenizer, *pair)[0] for pair in pairs]
            return [random.Random(str(tuple(ids))).uniform(-9, -1) for ids in rows]

        expected, _ = score_items(read_items(path), log_probs)
        found = score_task(encoded.tasks["named"], values).accuracy
        assert found.pop("byte") == found["char"]
        assert found == expected
    assert len(read_tasks([f"named={paths[0]}"], limit=1)[0].items) == 1
