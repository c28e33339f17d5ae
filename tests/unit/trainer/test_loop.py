"""Hooks see every moment of a run, in order."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from megatron.trainer.checkpoint import BackgroundSaver
from megatron.trainer.checkpoint.background import FinishedSave
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.health.stop import StopRule
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.journal import open_journal
from megatron.trainer.loop import Upkeep, train
from megatron.trainer.objective import NEXT_TOKEN, TokenObjective
from megatron.trainer.resume import checkpoint_writer, resume
from megatron.trainer.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

MOMENTS = [name for name in vars(Hook) if name.startswith("on_")]


class Moments(Hook):
    """Notes the name of each moment, with its iteration and whatever else is short."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in MOMENTS:
            return super().__getattribute__(name)

        def note(*arguments: Any, **_more: Any) -> None:
            shown = [each["iteration"] if isinstance(each, dict) else each for each in arguments]
            self.seen.append((name[3:], *(each for each in shown if not isinstance(each, float))))

        return note


def test_hooks_see_every_moment_in_order(make_state: Callable[..., TrainState]) -> None:
    state = make_state(
        train_iters=3, log_interval=2, eval_interval=2, eval_iters=2, split="80,20", save="unused"
    )
    saved: list[int] = []
    hooks = [Moments(), Moments()]
    upkeep = Upkeep(save=lambda current: saved.append(current.iteration))
    assert train(state, NEXT_TOKEN, hooks=hooks, upkeep=upkeep) is None
    evaluation = [("stage", "evaluation", 3), ("stage", "evaluation", 3), ("evaluation", 2)]
    last = [("stage", "evaluation", 4), ("stage", "evaluation", 4), ("evaluation", 3)]
    assert hooks[0].seen == [
        ("start", 0, 3),
        *(("stage", "step", 1), ("step", 1)),
        *(("stage", "step", 2), ("step", 2), ("log", 2)),
        *evaluation,
        *(("stage", "step", 3), ("step", 3)),
        *last,
        *(("stage", "save", 4), ("save", 3)),
        ("end",),
    ]
    assert hooks[1].seen == hooks[0].seen
    assert saved == [3]


class SlowSaver:
    """Stands for a BackgroundSaver whose saves take two steps each, or end with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.iteration: int | None = None
        self.polls = 0

    @property
    def is_saving(self) -> bool:
        return self.iteration is not None

    def begin(self, state: TrainState) -> None:
        assert not self.is_saving
        self.iteration, self.polls = state.iteration, 0

    def poll(self) -> bool:
        self.polls += 1
        return self.is_saving and self.polls > 2

    def wait(self) -> FinishedSave:
        iteration, self.iteration = self.iteration, None
        if self.error is not None:
            raise self.error
        assert iteration is not None
        return FinishedSave(
            iteration=iteration, path=Path("unused"), seconds=2.0, blocked_seconds=0.5
        )


def run_in_background(state: TrainState, saver: SlowSaver) -> Moments:
    hook = Moments()
    upkeep = Upkeep(save=saver.begin, background=cast("BackgroundSaver", saver))
    train(state, NEXT_TOKEN, hooks=[hook], upkeep=upkeep)
    return hook


def test_steps_go_on_while_a_checkpoint_is_written_and_the_last_one_is_waited_for(
    make_state: Callable[..., TrainState],
) -> None:
    state = make_state(train_iters=5, log_interval=9, save_interval=2, save="unused")
    hook = run_in_background(state, SlowSaver())
    seen = [moment for moment in hook.seen if moment[0] in ("step", "save") or "save" in moment]
    assert seen == [
        *(("step", 1), ("step", 2), ("stage", "save", 3)),
        *(("step", 3), ("step", 4), ("stage", "save", 5), ("save", 2)),  # one at a time
        *(("step", 5), ("stage", "save", 6), ("save", 4)),
        ("save", 5),
    ]
    assert hook.seen[-1] == ("end",)


def test_a_failed_save_in_the_background_ends_the_run(
    make_state: Callable[..., TrainState],
) -> None:
    state = make_state(train_iters=9, log_interval=9, save_interval=2, save="unused")
    with pytest.raises(CheckpointError, match="disk full"):
        run_in_background(state, SlowSaver(CheckpointError("disk full")))
    assert state.iteration == 4


def test_a_run_that_fails_finishes_the_checkpoint_that_is_being_written(
    make_state: Callable[..., TrainState],
) -> None:
    state = make_state(train_iters=9, log_interval=9, save_interval=2, save="unused")
    saver, hook = SlowSaver(), Moments()

    class FailingInTheFourth(TokenObjective):
        def forward(self, *arguments: Any) -> Any:
            if state.iteration == 3:
                raise DataError("no more data")
            return super().forward(*arguments)

    upkeep = Upkeep(save=saver.begin, background=cast("BackgroundSaver", saver))
    with pytest.raises(DataError, match="no more data"):
        train(state, FailingInTheFourth(), hooks=[hook], upkeep=upkeep)
    assert hook.seen[-2:] == [("save", 2), ("end",)]


def test_run_with_other_batches_is_done_with_its_tokens_and_says_so(
    make_state: Callable[..., TrainState], tmp_path: Path
) -> None:
    """Two steps of 4 of the 40 sequences; four of 8 are left, and 6 is the last number."""
    flags = {"train_iters": False, "train_tokens": 640, "micro_batch_size": 1, "save": tmp_path}
    first = make_state(**flags, global_batch_size=4, exit_interval=2)
    stop = train(first, NEXT_TOKEN, hooks=[], upkeep=Upkeep(save=checkpoint_writer(first)))
    assert stop is not None and stop.reason == "interval"
    second = make_state(**flags, global_batch_size=8, exit_interval=6, load=tmp_path)
    resume(second, second.cfg.model)  # type: ignore[attr-defined]
    journal = open_journal(str(tmp_path), rank=0, train_iters=second.cfg.training.train_iters)
    moments = Moments()
    # The last step is no early stop, though its number is a multiple of the interval.
    assert train(second, NEXT_TOKEN, hooks=[journal, moments]) is None
    journal.end(None)
    journal.close()
    assert (second.iteration, second.train_data.consumed_samples) == (6, 40)
    assert second.cfg.training.train_iters == 5
    assert ("start", 2, 6) in moments.seen
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert (ended["reason"], ended["iteration"], ended["train_iters"]) == ("finished", 6, 6)


def test_notice_in_the_last_step_of_several_ranks_does_not_unfinish_a_run(
    make_state: Callable[..., TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(train_iters=2, exit_duration_in_mins=1e6)
    state.ctx = dataclasses.replace(state.ctx, world_size=2)
    heard: list[int] = []

    def notice(_rule: StopRule) -> int:
        heard.append(state.iteration)
        return int(state.iteration == last)

    monkeypatch.setattr(StopRule, "notice", notice)
    last = 1
    assert train(state, NEXT_TOKEN, hooks=[]) is None
    assert state.iteration == 2 and 1 in heard

    state = make_state(train_iters=3, exit_duration_in_mins=1e6)
    state.ctx = dataclasses.replace(state.ctx, world_size=2)
    stop = train(state, NEXT_TOKEN, hooks=[])
    assert stop is not None and stop.reason == "duration" and state.iteration == 2
