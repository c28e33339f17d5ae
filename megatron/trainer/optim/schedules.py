"""Computes learning-rate schedules as functions of the steps done, or of the tokens consumed.

A decay is a function from the share of the decay that is done, 0 to 1, to the share of the way from
the peak to the final learning rate that is left, 1 to 0. A WSD schedule (warm-up, stable, decay)
keeps the peak until its tail, the decay, begins; an annealing branch is a tail alone, begun at some
step of another run. Both take any decay, and the geometric one, which is no share of a way: it
falls by the same factor at every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron.trainer.config.batch_plan import Progress
from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.config.schedule_lengths import Unit, schedule_lengths
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.errors import ConfigError

Decay = Callable[[float], float]


def cosine(done: float) -> float:
    """Compute half a cosine wave."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def linear(done: float) -> float:
    """Compute a straight line."""
    return 1.0 - done


def constant(_done: float) -> float:
    """Return 1: no decay."""
    return 1.0


def exponential(done: float) -> float:
    """Compute Megatron-LM's tail of that name: 2 x 0.5^done - 1, which is not geometric."""
    return 2.0 * 0.5**done - 1.0


def minus_sqrt(done: float) -> float:
    """Compute one minus the square root."""
    return 1.0 - math.sqrt(done)


DECAYS: dict[str, Decay] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "exponential": exponential,
    "minus_sqrt": minus_sqrt,
}
"""Decay shapes by the name that `lr_decay_style` and `lr_wsd_decay_style` take."""
GEOMETRIC = "geometric"
"""The decay of JetMoE: rate = peak x (final / peak)^done; it needs a final rate above 0."""
WSD = "WSD"
"""The style that stays at the peak until a tail of its own shape and length."""


def register_decay(name: str, decay: Decay) -> None:
    """Make `decay` known as `name`; a name that is taken is refused with a ValueError."""
    if name in (GEOMETRIC, WSD):
        raise ValueError(f"lr_decay_style '{name}' is built in; choose another name")
    if name in DECAYS:
        raise ValueError(
            f"lr_decay_style '{name}' is already registered as {DECAYS[name]!r}; choose"
            " another name"
        )
    DECAYS[name] = decay


def decayed(style: str, done: float, *, peak: float, final: float) -> float:
    """Return the learning rate when the share `done` (0 to 1) of a decay is over."""
    if style != GEOMETRIC:
        return final + (peak - final) * DECAYS[style](done)
    return peak * (final / peak) ** done if done < 1.0 else final


def _check_known(style: str, known: set[str], *, kind: str) -> None:
    """Refuse a style that is not in `known`, with a ValueError that names the nearest one."""
    if style not in known:
        raise ValueError(
            f"unknown {kind} '{style}'; known: {', '.join(sorted(known))}"
            f"{did_you_mean(style, known)}"
        )


def _check_decay(style: str, *, peak: float, final: float, kind: str) -> None:
    """Refuse a decay that nobody registered, or that cannot reach its end.

    Raises:
        ValueError: it is unknown, or geometric towards 0.
    """
    _check_known(style, {*DECAYS, GEOMETRIC}, kind=kind)
    if style == GEOMETRIC and not (peak > 0 and final > 0):
        raise ValueError(
            f"{kind} 'geometric' goes from a learning rate of {peak:g} to min_lr ({final:g}) by the"
            " same factor at every step, which 0 cannot be part of; give a min_lr above 0 (JetMoE:"
            " a tenth of the peak), or take linear to reach 0"
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Computes a linear warm-up, then a decay, then the final learning rate.

    Calling it with the steps done, or the tokens consumed, gives the next step's learning rate.
    """

    unit: Unit = "iters"
    """What all lengths are in: steps or tokens."""
    style: str
    """WSD, or the name of the decay that begins after the warm-up: geometric, a key of DECAYS."""
    peak: float
    """Learning rate at the end of the warm-up."""
    final: float
    """Learning rate from decay_end on; a constant schedule never leaves the peak."""
    warmup: int
    """Length of the warm-up."""
    warmup_init: float
    """Learning rate of the first step of the warm-up."""
    decay_end: int
    """Where the decay ends, counted from the start of training."""

    tail: str | None = None
    """WSD: name of the decay that ends the run; geometric or a key of DECAYS."""
    tail_length: int = 0
    """WSD: length of that decay, which ends at decay_end."""

    def __post_init__(self) -> None:
        """Refuse a decay that nobody registered, and a tail that does not fit.

        Raises:
            ValueError: with the remedy.
        """
        if self.style != WSD:
            _check_known(self.style, {*DECAYS, GEOMETRIC, WSD}, kind="lr_decay_style")
            _check_decay(self.style, peak=self.peak, final=self.final, kind="lr_decay_style")
            return
        if self.tail is None:
            raise ValueError(
                "lr_decay_style WSD needs lr_wsd_decay_style (None), the shape of its decay; use"
                f" one of {', '.join(sorted({*DECAYS, GEOMETRIC}))}"
            )
        _check_decay(self.tail, peak=self.peak, final=self.final, kind="lr_wsd_decay_style")
        if not 1 <= self.tail_length <= self.decay_end - self.warmup:
            steps = "steps" if self.unit == "iters" else self.unit
            raise ValueError(
                f"lr_wsd_decay_{self.unit} ({self.tail_length}) must be 1 to"
                f" {self.decay_end - self.warmup}, the {steps} between the warm-up"
                f" (lr_warmup_{self.unit} {self.warmup}) and the end of the decay"
                f" (lr_decay_{self.unit} or train_{self.unit}, {self.decay_end}); change one of the"
                " three"
            )

    def position(self, progress: Progress) -> int:
        """Return where on the curve a run is."""
        return progress.iteration if self.unit == "iters" else progress.tokens

    def __call__(self, done: int) -> float:
        """Return the learning rate of the step that begins when `done` steps or tokens are done."""
        if done < self.warmup:
            share = done / self.warmup
            return self.warmup_init + (self.peak - self.warmup_init) * share
        style, start = self.style, self.warmup
        if style == WSD:
            style, start = self.tail or "", self.decay_end - self.tail_length
            if done <= start:
                return self.peak
        length = self.decay_end - start
        share = min(1.0, (done - start) / length) if length > 0 else 1.0
        return decayed(style, share, peak=self.peak, final=self.final)

    def state_dict(self) -> dict[str, str | float | int | None]:
        """Return the curve by the names of its flags, to compare with that of a resumed run.

        A constant schedule has no end to keep, one without a tail no tail. No warm-up is the same
        in any unit.
        """
        unit = self.unit if self.warmup else "iters"
        curve: dict[str, str | float | int | None] = {
            "lr_decay_style": self.style,
            "lr": self.peak,
            f"lr_warmup_{unit}": self.warmup,
            "lr_warmup_init": self.warmup_init,
        }
        if self.style != "constant":
            curve |= {"min_lr": self.final, f"lr_decay_{self.unit}": self.decay_end}
        if self.style == WSD:
            curve |= {
                "lr_wsd_decay_style": self.tail,
                f"lr_wsd_decay_{self.unit}": self.tail_length,
            }
        return curve


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """Computes the schedule of an annealing branch: a tail that begins at a step of another run.

    Calling it with the steps done, the other run's included, or with the tokens that the branch has
    consumed gives the learning rate of the next step.
    """

    unit: Unit = "iters"
    """What the length of the tail is in: steps or tokens."""
    start: int
    """Steps that the other run had done."""
    peak: float
    """Learning rate of its next step, where the tail begins."""
    final: float
    """Learning rate from the end of the tail on."""
    tail: str
    """Name of the decay: geometric or a key of DECAYS."""
    tail_length: int
    """Length of the decay, at least 1."""

    def __post_init__(self) -> None:
        """Refuse a decay that is unknown or would rise.

        Raises:
            ValueError: with the remedy.
        """
        _check_decay(self.tail, peak=self.peak, final=self.final, kind="lr_wsd_decay_style")
        if self.final > self.peak:
            raise ValueError(
                f"min_lr ({self.final:g}) is above the learning rate that the branch begins with"
                f" ({self.peak:g}, that of step {self.start} of the run it branches from); a decay"
                " must not rise; lower --min-lr"
            )

    def position(self, progress: Progress) -> int:
        """Return where on the curve a branch is."""
        return progress.iteration if self.unit == "iters" else progress.own_tokens

    def __call__(self, done: int) -> float:
        """Return the learning rate of the step that begins when `done` steps or tokens are done."""
        start = self.start if self.unit == "iters" else 0
        share = min(1.0, max(0.0, (done - start) / self.tail_length))
        return decayed(self.tail, share, peak=self.peak, final=self.final)

    def state_dict(self) -> dict[str, str | float | int]:
        """Return the curve by the names of its flags; `anneal_lr` is the rate it begins with."""
        return {
            "anneal_from": self.start,
            "anneal_lr": self.peak,
            "min_lr": self.final,
            "lr_wsd_decay_style": self.tail,
            f"lr_wsd_decay_{self.unit}": self.tail_length,
        }


def build_schedule(cfg: RunConfig) -> Schedule | Anneal:
    """Build the schedule; that of a branch as if it began with `lr`, which `resume` corrects.

    Raises:
        ConfigError: the shape is unknown, or its parts do not fit together.
    """
    optimizer = cfg.optimizer
    if cfg.checkpoint.anneal_from is not None:
        return anneal_schedule(cfg, optimizer.lr)
    lengths = schedule_lengths(cfg)
    try:
        return Schedule(
            unit=lengths.unit,
            style=optimizer.lr_decay_style,
            peak=optimizer.lr,
            final=optimizer.min_lr,
            warmup=lengths.warmup,
            warmup_init=optimizer.lr_warmup_init,
            decay_end=lengths.decay_end,
            tail=optimizer.lr_wsd_decay_style,
            tail_length=lengths.tail,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def anneal_schedule(cfg: RunConfig, rate: float) -> Anneal:
    """Build the schedule of a branch that begins with the learning rate `rate`.

    Raises:
        ConfigError: its tail cannot begin there.
    """
    start, optimizer = cfg.checkpoint.anneal_from, cfg.optimizer
    style, lengths = optimizer.lr_wsd_decay_style, schedule_lengths(cfg)
    assert start is not None and style is not None and lengths.tail  # `validate` saw to it
    try:
        return Anneal(
            unit=lengths.unit,
            start=start,
            peak=rate,
            final=optimizer.min_lr,
            tail=style,
            tail_length=lengths.tail,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
