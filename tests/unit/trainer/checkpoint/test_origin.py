"""What a run starts from, by its flags and what the directories hold: the whole table."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.checkpoint.origin import Origin, decide_origin, has_checkpoints
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import CheckpointConfig, OptimizerConfig
from megatron.trainer.errors import CheckpointError
from moe_app.pretrain.config import PretrainConfig


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(*, lr: float = 1e-3, **flags: Any) -> PretrainConfig:
    return PretrainConfig(
        checkpoint=dataclasses.replace(CheckpointConfig(), **flags),
        optimizer=dataclasses.replace(OptimizerConfig(), lr=lr),
    )


def add_checkpoint(directory: str, iteration: int, cfg: PretrainConfig | None = None) -> Path:
    """What a run with these settings leaves in its directory."""
    path = Path(directory) / f"iter_{iteration:07}"
    path.mkdir(parents=True)
    if cfg is not None:
        (path / "config.yaml").write_text(dump_config(cfg))
    return path


def add_records(directory: str, *events: str) -> None:
    Path(directory).mkdir(exist_ok=True)
    (Path(directory) / "metrics.jsonl").write_text('{"iteration": 4, "lm_loss": 9.0}\n')
    lines = (json.dumps({"iteration": 3, "event": event}) + "\n" for event in events)
    (Path(directory) / "events.jsonl").write_text("".join(lines))


def begun_elsewhere(load: str = "other") -> Origin:
    return Origin(load=Path(load), is_continued=False, has_checkpoints=False)


REPEATED = Origin(load=Path("new"), is_continued=True, has_checkpoints=True, is_repeated=True)
CONTINUED = Origin(load=Path("new"), is_continued=True, has_checkpoints=True)
FROM_OTHER: dict[str, Any] = {"load": "other", "save": "new", "ckpt_step": 7}


def test_run_from_another_begins_in_a_directory_without_one() -> None:
    assert decide_origin(config(**FROM_OTHER)) == begun_elsewhere()
    add_records("new", "start")
    assert decide_origin(config(**FROM_OTHER)) == begun_elsewhere()


@pytest.mark.parametrize(
    "flags", [FROM_OTHER, {**FROM_OTHER, "finetune": True}, {"load": "new", "save": "new"}]
)
def test_command_that_began_the_run_goes_on_with_it(flags: dict[str, Any]) -> None:
    cfg = config(**flags)
    add_checkpoint("new", 3, cfg)
    add_records("new", "start", "save")
    expected = CONTINUED if flags["load"] == "new" else REPEATED
    assert decide_origin(cfg) == expected


def test_weights_taken_from_its_own_directory_are_taken_once() -> None:
    cfg = config(load="new", save="new", finetune=True)
    add_checkpoint("new", 3, config(load="new", save="new"))
    with pytest.raises(CheckpointError, match=r"^new holds an earlier run; .*finetune: checkpoint"):
        decide_origin(cfg)
    add_checkpoint("new", 6, cfg)
    assert decide_origin(cfg) == REPEATED


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (config(load="third", save="new", ckpt_step=7), "load: checkpoint third, this run other"),
        (config(**FROM_OTHER, lr=0.5), "lr: checkpoint 0.5, this run 0.001"),
        (config(**FROM_OTHER, finetune=True), "finetune: checkpoint True, this run False"),
        (config(save="new"), "ckpt_step: checkpoint None, this run 7, load: checkpoint None, this"),
        (config(load="new", save="new"), "load: checkpoint new, this run other"),
    ],
)
def test_run_that_another_command_began_is_refused(saved: PretrainConfig, said: str) -> None:
    add_checkpoint("new", 3, saved)
    message = (
        "new holds an earlier run; continue it with --load new (without --finetune), or give --save"
        " another directory; another command began it: "
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}.*{re.escape(said)}"):
        decide_origin(config(**FROM_OTHER))


def test_newest_checkpoint_says_who_wrote_the_run() -> None:
    cfg = config(**FROM_OTHER)
    add_checkpoint("new", 3, cfg)
    newest = add_checkpoint("new", 6, config(load="new", save="new"))
    with pytest.raises(CheckpointError, match="another command began it"):
        decide_origin(cfg)
    # One that cannot be read says nothing, nor does one that was being written.
    (newest / "config.yaml").write_bytes(b"\xff")
    (Path("new") / "iter_0000009.tmp-0bad").mkdir()
    assert decide_origin(cfg) == REPEATED
    (Path("new") / "iter_0000003" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"^new holds an earlier run; .* another directory$"):
        decide_origin(cfg)


def test_run_from_initial_weights_is_refused_even_by_its_own_command() -> None:
    cfg = config(save="new")
    assert decide_origin(cfg) == Origin(load=None, is_continued=False, has_checkpoints=False)
    add_checkpoint("new", 3, cfg)
    with pytest.raises(CheckpointError, match=r"^new holds an earlier run; continue it with"):
        decide_origin(cfg)


def test_checkpoints_are_looked_for_up_to_an_iteration() -> None:
    assert not has_checkpoints(Path("new"))
    add_checkpoint("new", 6)
    assert has_checkpoints(Path("new")) and has_checkpoints(Path("new"), upto=6)
    assert not has_checkpoints(Path("new"), upto=5)
