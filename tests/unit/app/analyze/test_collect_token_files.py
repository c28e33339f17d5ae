"""Token files that another tokenizer wrote are no texts for a model: routing would mean nothing."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.config.schema import DataConfig
from megatron.trainer.errors import DataError
from moe_app.analyze import collect
from moe_app.data import preprocess_data
from moe_app.infer import open_model
from moe_app.infer.open_model import OpenedCheckpoint
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer


class ReachedModelError(Exception):
    """Says that the checks were passed."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a call of `collect` up to the model, which has the tokenizer of `tmp_path`/mine."""
    make_hf_tokenizer(tmp_path / "mine", ["<unk>", "</s>"], config={"eos_token_id": 1})
    saved: Any = SimpleNamespace(
        data=DataConfig(tokenizer_type="HFTokenizer", tokenizer_model="mine/tokenizer.json"),
        model=SimpleNamespace(vocab_size=500),
        training=SimpleNamespace(seq_length=8),
    )

    def load_model(*given: Any, **settings: Any) -> Any:
        raise ReachedModelError

    found = FoundCheckpoint(path=tmp_path / "mine", iteration=1)
    opened = OpenedCheckpoint(found=found, saved=saved)
    monkeypatch.setattr(open_model, "open_checkpoint", lambda args, prog: opened)
    monkeypatch.setattr(open_model, "load_model", load_model)

    def call(prefix: str) -> None:
        parser = argparse.ArgumentParser()
        collect.add_flags(parser)
        files = ["--data-path", f"a={prefix}", "--output", str(tmp_path / "out")]
        collect.collect(parser.parse_args([*files, "--load", str(tmp_path)]))

    return call


def test_token_file_of_another_tokenizer_is_refused_with_both_names(
    tmp_path: Path, run: Any
) -> None:
    other = make_hf_tokenizer(
        tmp_path / "other", ["<unk>", "</s>", "<x>"], config={"eos_token_id": 1}
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    for name, model in (("a", other), ("b", f"{tmp_path}/mine/tokenizer.json")):
        command = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / name)]
        command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", model]
        assert preprocess_data.main(command) == 0
    with pytest.raises(DataError) as caught:
        run(f"{tmp_path}/a_text_document")
    assert f"{tmp_path}/a_text_document was written with tokenizer.json" in str(caught.value)
    assert f"the model's tokenizer is {tmp_path}/mine/tokenizer.json" in str(caught.value)
    with pytest.raises(ReachedModelError):
        run(f"{tmp_path}/b_text_document")
    Path(f"{tmp_path}/a_text_document.json").unlink()  # nothing to compare with
    with pytest.raises(ReachedModelError):
        run(f"{tmp_path}/a_text_document")
