"""Only the fields that a command line names are described to the parser, to the same result."""

from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config import cli
from megatron.trainer.config.schema import RunConfig


def load(*argv: str) -> RunConfig:
    presets = {"small": {"seq_length": 64}}
    return cli.load_config(RunConfig, argv, prog="p", description="", presets=presets)


def test_fields_that_are_named_are_parsed_alone_to_what_all_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "recipe.yaml")
    Path(path).write_text("lr: 0.5\nbf16: true\ndata_path: [a, b]\nsave: x\n")
    commands = [
        ["--config", path],
        ["--config", path, "--no-bf16", "--save", "None", "--lr=0.25", "--lr", "0.125"],
        ["--data-path", "0.5", "c", "0.5", "d", "--preset", "small", "--sequence-parallel"],
        ["--no-sequence-parallel", "--eval-interval", "7", "--rampup-batch-size", "2", "2", "12"],
    ]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_all_fields", lambda *_: pytest.fail("all fields are described"))
        found = [load(*argv) for argv in commands]

    def refuse(*_: Any) -> type:
        raise SystemExit(2)

    monkeypatch.setattr(cli, "_named_fields", refuse)
    assert found == [load(*argv) for argv in commands]
    assert len({str(cfg) for cfg in found}) == len(commands)
    assert found[1].optimizer.lr == 0.125 and found[1].checkpoint.save is None
