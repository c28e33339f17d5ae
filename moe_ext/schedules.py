"""Learning-rate schedules as functions step -> value.

A decay is a function from the share of the decay that is done, 0 to 1, to the share of the way from
the peak to the final learning rate that is left, 1 to 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_ext import registry

Decay = Callable[[float], float]


def cosine(done: float) -> float:
    """Half a cosine wave."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """A straight line."""
    return 1.0 - done


def constant(_done: float) -> float:
    """No decay."""
    return 1.0


DECAYS: dict[str, Decay] = {"cosine": cosine, "linear": linear, "constant": constant}
"""Decay shapes by the name that `lr_decay_style` takes."""


def register_decay(name: str, decay: Decay) -> None:
    """Make `decay` known as `name`; a name that is taken is refused with a ValueError."""
    registry.add(DECAYS, name, decay, kind="lr_decay_style")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a decay, then the final learning rate.

    Calling it with the number of steps done gives the learning rate of the next step.
    """

    style: str
    """Name of the decay, a key of DECAYS."""
    peak: float
    """Learning rate at the end of the warm-up."""
    final: float
    """Learning rate from decay_iters on; a constant schedule never leaves the peak."""
    warmup_iters: int
    """Steps of warm-up."""
    warmup_init: float
    """Learning rate of the first step of the warm-up."""
    decay_iters: int
    """Step at which the decay ends, counted from the start of training."""

    def __post_init__(self) -> None:
        """Refuse a decay that nobody registered."""
        registry.look_up(DECAYS, self.style, kind="lr_decay_style")

    def __call__(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if step < self.warmup_iters:
            share = step / self.warmup_iters
            return self.warmup_init + (self.peak - self.warmup_init) * share
        length = self.decay_iters - self.warmup_iters
        done = min(1.0, (step - self.warmup_iters) / length) if length > 0 else 1.0
        return self.final + (self.peak - self.final) * DECAYS[self.style](done)

    def state_dict(self) -> dict[str, str | float | int]:
        """The curve by the names of its flags, to tell whether a resumed run follows the same.

        A constant schedule has no end to keep.
        """
        curve: dict[str, str | float | int] = {
            "lr_decay_style": self.style,
            "lr": self.peak,
            "lr_warmup_iters": self.warmup_iters,
            "lr_warmup_init": self.warmup_init,
        }
        if self.style != "constant":
            curve |= {"min_lr": self.final, "lr_decay_iters": self.decay_iters}
        return curve
