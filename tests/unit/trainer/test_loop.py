"""Hooks see every moment of a run, in order."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron.trainer.hooks.base import Hook
from megatron.trainer.loop import Upkeep, train
from megatron.trainer.state import TrainState
from megatron.trainer.step import language_model_step

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
    assert train(state, language_model_step, hooks=hooks, upkeep=upkeep) is None
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
