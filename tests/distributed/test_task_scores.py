"""Tasks get the same scores under every layout, with the model that trains under it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.data.tokenizer import HFTokenizer
from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import Outcome, flags, run_cases
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

END = "<|endoftext|>"
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
PP2: dict[str, object] = {"pipeline-model-parallel-size": 2}
TWO_RANKS: dict[str, dict[str, object]] = {
    "tp2": {**TP2, "use-distributed-optimizer": True},
    "pp2": PP2,
    "pp2_interleaved": {**PP2, "num-virtual-stages-per-pipeline-rank": 2},
    "ep2": {"expert-model-parallel-size": 2},
    "ep2_allgather": {
        "expert-model-parallel-size": 2,
        "moe-token-dispatcher-type": "allgather",
    },
    "dp2": {},
    "cp2": {"context-parallel-size": 2},
}
WORDS = "the quick brown fox jumps over the lazy dog".split()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Two steps with an evaluation after each, under every layout."""
    out = tmp_path_factory.mktemp("task_scores")
    tokenizer = make_hf_tokenizer(out, [END], tokenizer_config={"eos_token": END})
    items = [
        {
            "context": " ".join(WORDS[number % 5 : 5 + number % 4]),
            "choices": [" ".join(WORDS[(number + k) % 9 :][: 1 + k]) for k in range(3)],
            "label": number % 3,
        }
        for number in range(7)  # no number of ranks or rows divides it
    ]
    file = out / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    reader = HFTokenizer(tokenizer)
    with TokenFileWriter(str(out / "web_text_document"), vocab_size=320) as writer:
        for number in range(48):
            text = " ".join(WORDS[(number + k) % 9] for k in range(1 + 7 * number % 40))
            writer.add_document([*reader.encode_document(text), reader.eod])
        writer.finish()
    given = {
        "data-path": out / "web_text_document",
        "split": "60,40",
        "eval-iters": 2,
        "eval-documents": 7,
        "vocab-size": 320,
        "train-iters": 2,
        "eval-interval": 1,
        "micro-batch-size": 1,
        "global-batch-size": 4,
        "eval-tasks": file,
        "tokenizer-type": "HFTokenizer",
        "tokenizer-model": tokenizer,
    }
    cases = {**TWO_RANKS, "bf16": {**TP2, "sequence-parallel": True, "bf16": True}}
    two = {name: flags(**given, **case) for name, case in cases.items()}
    return {
        **run_cases(1, {"single": flags(**given)}, Path(out / "1")),
        **run_cases(2, two, Path(out / "2")),
    }


@pytest.mark.parametrize("name", TWO_RANKS)
def test_scores_are_those_of_one_rank(name: str, outcomes: dict[str, Outcome]) -> None:
    found, truth = outcomes[name], outcomes["single"]
    assert found.error is None, found.error
    theirs: list[Any] = truth.series("task_bits_per_byte")
    ours: list[Any] = found.series("task_bits_per_byte")
    bits = [each["items"] for each in theirs]
    assert len(bits) == 2 and bits[0] != bits[1]
    # fp32 sums in another order.
    assert [each["items"] for each in ours] == pytest.approx(bits, rel=1e-5)
    assert found.series("task_accuracy") == truth.series("task_accuracy")


@pytest.mark.parametrize("name", TWO_RANKS)
def test_figures_of_validation_are_those_of_one_rank(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    found, truth = outcomes[name], outcomes["single"]
    for key in ("valid_metrics", "valid_documents"):
        theirs: list[Any] = truth.series(key)
        ours: list[Any] = found.series(key)
        assert len(ours) == len(theirs) == 2 and theirs[0] != theirs[1]
        for mine, wanted in zip(ours, theirs, strict=True):
            assert {"perplexity", "bits_per_byte"} <= wanted["web"].keys()
            assert mine["web"] == pytest.approx(wanted["web"], rel=1e-5)


def test_figures_in_bf16_are_as_near_to_fp32_as_its_digits_allow(
    outcomes: dict[str, Outcome],
) -> None:
    found, truth = outcomes["bf16"], outcomes["single"]
    assert found.error is None, found.error
    digits = 2**-7  # between neighbouring numbers of 8 bits
    for key, name in (("task_bits_per_byte", "items"), ("valid_loss", "web")):
        theirs: list[Any] = truth.series(key)
        ours: list[Any] = found.series(key)
        exact = [each[name] for each in theirs]
        assert abs(exact[1] / exact[0] - 1) > 3 * digits  # a step is seen
        assert [each[name] for each in ours] == pytest.approx(exact, rel=digits)
        assert [each[name] for each in ours] != pytest.approx(exact, rel=1e-5)  # it is bf16
