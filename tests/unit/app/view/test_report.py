"""The report, over run directories written by hand."""

import json
import math
import re
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import CheckpointConfig, DataConfig, TrainingConfig
from megatron.trainer.data.writer import TokenFileWriter
from moe_app.pretrain.config import PretrainConfig
from moe_app.view import report
from moe_ext.config import MoEModelConfig

VOCAB = 50
# Documents of 10 tokens; a quarter is held back, and its tokens are others than those before.
DOCUMENTS = [[(i * j) % 7 for j in range(10)] for i in range(30)] + [
    [20 + (i * j) % 3 for j in range(10)] for i in range(10)
]
EXTRA = [[5, 6, 5, 5, 7, 5, 6, 5, 9, 5]]


def entropy_by_hand(documents: list[list[int]]) -> float:
    counts = Counter(token for document in documents for token in document)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


CODE, DOCS = entropy_by_hand(DOCUMENTS[30:]), entropy_by_hand(EXTRA)


def write_tokens(prefix: Path, documents: list[list[int]]) -> str:
    with TokenFileWriter(str(prefix), vocab_size=VOCAB) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return str(prefix)


def step(iteration: int, loss: float, speed: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * 64,
        "lm_loss": loss,
        "tokens_per_second": speed,
        "moe_max_load_ratio": 3.5,
        "moe_dead_experts": 2.0,
        "layer_max_load_ratio": [1.25, 3.5, 2.0, None],
    }


def evaluation(iteration: int, **losses: float | None) -> dict[str, Any]:
    return {"iteration": iteration, "consumed_tokens": iteration * 64, "valid_loss": losses}


def write_run(folder: Path, records: list[dict[str, Any]], **data: Any) -> Path:
    """A run directory; its data is two validation sets unless `data` says otherwise."""
    if not data:
        code = write_tokens(folder / "code_text_document", DOCUMENTS)
        docs = write_tokens(folder / "docs_text_document", EXTRA)
        data = {"data_path": (code,), "split": "3,1", "valid_data_path": (f"docs={docs}",)}
    run = folder / "run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "loss.png").touch()
    cfg = PretrainConfig(
        model=MoEModelConfig(vocab_size=VOCAB),
        training=TrainingConfig(seq_length=8, train_iters=30),
        data=DataConfig(**data),
        checkpoint=CheckpointConfig(save=str(run)),
    )
    (run / "config.yaml").write_text(dump_config(cfg))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_report_says_what_the_records_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        step(10, 3.0, 100.0),
        evaluation(10, code=0.5, docs=2.0),
        step(20, 2.0, 900.0),
        step(30, 2.5, 1300.0),
        evaluation(30, code=0.75, docs=1.0),
    ]
    run = write_run(tmp_path, records)
    assert report.main(["--run", str(run)]) == 0
    expected = [
        "iterations      30 of 30, 1,920 tokens",
        "training loss   2.5000 nats per token",
        "speed           900 tokens/s, median of 3 records",
        "busiest expert  3.50 x an even share, in layer 2",
        "dead experts    2 of 256 in the last batch",
        "",
        "validation      last loss  best loss     unigram entropy  difference",
        f"code            0.7500     0.5000 at 10  {CODE:.4f}{'':9}  {0.75 - CODE:+.4f}     below",
        f"docs            1.0000     1.0000 at 30  {DOCS:.4f}{'':9}  {1.0 - DOCS:+.4f}     below",
        "",
        f"run directory   {run}",
        f"metrics         {run}/metrics.jsonl",
        f"loss plot       {run}/plots/loss.png",
    ]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("margin", [-1e-3, 1e-3])
def test_status_follows_the_entropy_of_the_tokens_held_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], margin: float
) -> None:
    run = write_run(tmp_path, [evaluation(30, code=CODE + margin, docs=DOCS - 0.1)])
    assert report.main(["--run", str(run)]) == 0
    capsys.readouterr()
    status = report.main(["--run", str(run), "--require-below-entropy"])
    last = capsys.readouterr().out.splitlines()[-1]
    if margin < 0:
        assert status == 0
        assert last == "PASSED: every validation loss is below its set's unigram entropy"
    else:
        assert status == 1
        assert last == (
            "FAILED: validation loss is not below the unigram entropy"
            f" (code: loss {CODE + margin:.4f}, unigram entropy {CODE:.4f})"
        )


def test_the_last_loss_counts_not_the_best(tmp_path: Path) -> None:
    records = [evaluation(10, code=0.1, docs=0.1), evaluation(30, code=9.0, docs=0.1)]
    run = write_run(tmp_path, records)
    assert report.main(["--run", str(run), "--require-below-entropy"]) == 1


def test_a_loss_that_was_not_finite_is_not_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [evaluation(10, code=0.1, docs=0.1), evaluation(30, code=None, docs=0.1)]
    run = write_run(tmp_path, records)
    assert report.main(["--run", str(run), "--require-below-entropy"]) == 1
    out = capsys.readouterr().out
    assert "0.1000 at 10" in out
    assert f"(code: loss not known, unigram entropy {CODE:.4f})" in out


def test_entropy_of_random_tokens_is_that_of_a_uniform_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, [evaluation(30, mock=4.0)], mock_data=True)
    assert report.main(["--run", str(run), "--require-below-entropy"]) == 1
    assert f"unigram entropy {math.log(VOCAB):.4f})" in capsys.readouterr().out


def test_run_without_validation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, [step(10, 3.0, 100.0)])
    assert report.main(["--run", str(run)]) == 0
    assert "validation      none: the run has no validation set" in capsys.readouterr().out
    assert report.main(["--run", str(run), "--require-below-entropy"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "FAILED: no validation loss to compare with a unigram entropy"
    )


def test_run_whose_data_is_gone_is_reported_without_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, [step(30, 2.0, 100.0), evaluation(30, code=0.1, docs=0.1)])
    (tmp_path / "code_text_document.bin").unlink()
    assert report.main(["--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "training loss   2.0000 nats per token" in out
    assert "unigram entropy is not known: " in out and "code_text_document" in out
    assert report.main(["--run", str(run), "--require-below-entropy"]) == 1


def test_run_on_conversations_is_reported_without_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, [step(30, 2.0, 100.0), evaluation(30, valid=1.5)], split="1,0")
    assert report.main(["--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^valid +1\.5000 +1\.5000 at 30", out, re.MULTILINE)
    assert "unigram entropy is not known" not in out


def test_run_that_logged_nothing_yet_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, [])
    assert report.main(["--run", str(run)]) == 0
    assert "no training record yet (one every 10 iterations of 30)" in capsys.readouterr().out


def test_directory_without_a_run_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: {tmp_path} holds no config.yaml; --run must be the --save directory of a"
        " run; check the path\n"
    )


def test_report_says_what_each_of_several_sources_gave() -> None:
    record = {**step(10, 3.0, 1000.0), "consumed_tokens": 640}
    cfg = PretrainConfig()
    one = {**record, "consumed_tokens_per_source": {"code": 640}}
    two = {**record, "consumed_tokens_per_source": {"code": 480, "docs": 160}}

    def lines(last: dict[str, Any]) -> list[str]:
        return report.describe_training(cfg, report.Metrics(last=last, speeds=array("d", [1.0])))

    assert not any(line.startswith("tokens from") for line in lines(one))
    assert "tokens from     code 480 (75.0%), docs 160 (25.0%)" in lines(two)


def test_report_says_what_an_alignment_prefers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"chosen": 0.25, "rejected": -0.5, "margin": 0.75, "accuracy": 0.875}
    record = {"dpo_loss": 0.5, **{f"rewards_{name}": each for name, each in figures.items()}}
    run = write_run(
        tmp_path, [record | {k: v for k, v in step(30, 0.0, 100.0).items() if k != "lm_loss"}]
    )
    (run / "plots" / "preferences.png").touch()
    assert report.main(["--run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "training loss   0.5000 nats per pair" in lines
    assert "rewards         chosen 0.2500, rejected -0.5000, margin 0.7500" in lines
    assert "preferences     87.5% met in the last batch" in lines
    assert f"preferences     {run}/plots/preferences.png" in lines
