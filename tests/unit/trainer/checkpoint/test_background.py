"""Saving in a thread: what is written is the state at the time of the save."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron.trainer.checkpoint import (
    BackgroundSaver,
    background,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.trainer.errors import CheckpointError, ConfigError


class Gate:
    """Holds the thread before it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        write = background.write_checkpoint

        def wait_and_write(*arguments: Any, **named: Any) -> Path:
            assert self.is_open.wait(120)
            return write(*arguments, **named)

        monkeypatch.setattr(background, "write_checkpoint", wait_and_write)


def make_state(weight: torch.Tensor, note: list[int]) -> dict[str, Any]:
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", weight),
        "object": ShardedObject("object", note, (1,), (0,)),
        "plain": note,
    }


@pytest.fixture
def saver() -> BackgroundSaver:
    return BackgroundSaver(torch.device("cpu"))


def loaded(path: Path) -> dict[str, Any]:
    return load_checkpoint(path, make_state(torch.zeros(5), []))


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_state_of_the_save_is_written_however_training_goes_on(
    saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    weight, note = torch.arange(5.0), [7]
    saver.save(tmp_path, 7, make_state(weight, note))
    weight.fill_(-1.0)
    note[0] = -1
    assert saver.is_saving
    assert not saver.poll()
    assert not list(tmp_path.iterdir())
    gate.is_open.set()
    done = saver.wait()
    assert not saver.is_saving
    assert (done.iteration, done.path) == (7, tmp_path / "iter_0000007")
    assert 0 < done.blocked_seconds < done.seconds
    state = loaded(find_checkpoint(tmp_path).path)
    assert torch.equal(state["weight"], torch.arange(5.0))
    assert (state["object"], state["plain"]) == ([7], [7])


def test_files_are_those_of_a_save_in_the_foreground(
    saver: BackgroundSaver, tmp_path: Path
) -> None:
    weight = torch.arange(5.0)
    save_checkpoint(tmp_path / "front", 3, make_state(weight, [3]), files={"run.json": "{}"})
    saver.save(tmp_path / "back", 3, make_state(weight, [3]), files={"run.json": "{}"})
    saver.wait()
    front, back = (files_of(tmp_path / each / "iter_0000003") for each in ("front", "back"))
    assert back.keys() == front.keys()
    # .metadata and the manifest hold an identifier and the hash of .metadata.
    for name in front.keys() - {".metadata", "manifest.json"}:
        assert back[name] == front[name], name


def test_poll_says_when_a_save_is_over(saver: BackgroundSaver, tmp_path: Path) -> None:
    assert not saver.poll()
    saver.save(tmp_path, 1, make_state(torch.ones(5), []))
    while not saver.poll():
        threading.Event().wait(0.01)
    assert find_checkpoint(tmp_path).iteration == 1
    assert saver.is_saving  # until it is waited for
    with pytest.raises(RuntimeError, match="iteration 1 is still being saved"):
        saver.save(tmp_path, 2, make_state(torch.ones(5), []))
    saver.wait()
    with pytest.raises(RuntimeError, match="no save has begun"):
        saver.wait()


def test_a_failure_in_the_thread_is_raised_by_wait_and_spares_the_earlier_checkpoint(
    saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, make_state(torch.ones(5), []))

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron.trainer.checkpoint.save.dcp.save", no_space)
    saver.save(tmp_path, 2, make_state(torch.zeros(5), []))
    with pytest.raises(CheckpointError, match=r"iteration 2 .*No space left .*are untouched"):
        saver.wait()
    assert not saver.is_saving
    assert [path.name for path in tmp_path.glob("iter*")] == ["iter_0000001"]
    assert torch.equal(loaded(find_checkpoint(tmp_path).path)["weight"], torch.ones(5))


@pytest.mark.parametrize(
    ("begin", "error"),
    [
        (lambda saver, root: saver.save(root, 1, {"plain": object()}), CheckpointError),
        (lambda saver, root: saver.save(root, 1, {}, keep_last=0), ConfigError),
    ],
)
def test_what_cannot_be_saved_is_refused_before_training_goes_on(
    saver: BackgroundSaver,
    tmp_path: Path,
    begin: Callable[[BackgroundSaver, Path], None],
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        begin(saver, tmp_path)
    assert not saver.is_saving
    assert not list(tmp_path.iterdir())
