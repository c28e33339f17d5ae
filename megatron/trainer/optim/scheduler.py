"""Defines the learning-rate schedule's interface, and which one a resumed run may follow."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron.trainer.config.batch_plan import BatchChange, Progress
from megatron.trainer.errors import CheckpointError

logger = logging.getLogger(__name__)

_EXTENSIBLE = {"lr_decay", "lr_wsd_decay"}
"""What may change in a WSD schedule before its decay begins, in steps or tokens."""
_STEPS, _TOKENS = "_iters", "_tokens"
"""What the name of a length ends with."""


class LRSchedule(Protocol):
    """Maps steps done, or tokens consumed, to the learning rate of the next step."""

    def position(self, progress: Progress) -> int:
        """Return which of the two it is where a run is."""
        ...

    def __call__(self, done: int) -> float:
        """Return the learning rate of the step that begins when so much is done."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Its shape and lengths by the names of their flags, kept in checkpoints."""
        ...


def check_schedule(
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    *,
    iteration: int,
    override: bool,
    batch: BatchChange | None = None,
) -> None:
    """Refuse to continue under another learning-rate curve, unless `override` asks for it.

    Before the decay of a WSD schedule begins, its begin and its end may be moved: the steps done
    are the same. A curve in steps and one in tokens are the same while all steps have one batch.

    Args:
        wanted: This run's schedule, as its state_dict gives it.
        saved: The checkpoint's.
        iteration: Steps done.
        override: Take this run's schedule whatever the checkpoint's is.
        batch: What a step was and is; None compares the schedules alone.

    Raises:
        CheckpointError: They differ; every difference is listed.
    """
    given = wanted, saved
    if batch is not None:
        wanted, saved = _in_one_unit(wanted, saved, batch)
    changed = [key for key in sorted({*wanted, *saved}) if wanted.get(key) != saved.get(key)]
    if not changed:
        return
    told = "; ".join(
        f"--{key.replace('_', '-')}: checkpoint {saved.get(key)}, this run {wanted.get(key)}"
        for key in changed
    )
    if override:
        logger.warning("--override-schedule from iteration %d on: %s", iteration, told)
        return
    done, unit = (iteration, _STEPS) if batch is None else _done(wanted, batch.progress)
    early = ""
    if set(map(_stem, changed)) <= _EXTENSIBLE and wanted.get("lr_decay_style") == "WSD":
        names = [f"{stem}{unit}" for stem in sorted(_EXTENSIBLE)]
        begins = [
            curve[names[0]] - curve[names[1]]
            for curve in (saved, wanted)
            if all(type(curve.get(name)) is int for name in names)
        ]
        what = "step" if unit == _STEPS else "token"
        if len(begins) == 2 and done <= min(begins):
            logger.info(
                f"the decay begins at {what} %d instead of %d, which is still to come: %s",
                begins[1],
                begins[0],
                told,
            )
            return
        if len(begins) == 2:
            early = (
                f" (the decay would begin at {what} {begins[1]}, the checkpoint's at {begins[0]},"
                f" and {done} {what}s are done: it can be moved only before it begins, to a"
                f" {what} still to come)"
            )
    raise CheckpointError(
        f"the checkpoint follows another learning-rate schedule: {told}{early}"
        f"{_blame_batch(changed, given[1], batch)}. Give this run the"
        " checkpoint's values (--lr-decay-iters is --train-iters where it is not given), follow"
        " this run's from here on with --override-schedule, or start a new schedule from the"
        " weights with --finetune"
    )


def _stem(key: str) -> str:
    """Return the name of a length without its unit, any other name as it is."""
    return key.removesuffix(_STEPS).removesuffix(_TOKENS)


def _is_in_tokens(curve: Mapping[str, Any]) -> bool:
    return any(key.endswith(_TOKENS) for key in curve)


def _done(curve: Mapping[str, Any], progress: Progress) -> tuple[int, str]:
    """Return how much is done, and in which unit the curve counts it."""
    if _is_in_tokens(curve):
        return progress.tokens, _TOKENS
    return progress.iteration, _STEPS


def _in_one_unit(
    wanted: Mapping[str, Any], saved: Mapping[str, Any], batch: BatchChange
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return both curves in steps if one of them is and a step has always been as many tokens."""
    if _is_in_tokens(wanted) == _is_in_tokens(saved):
        return wanted, saved
    size = batch.saved if _is_in_tokens(wanted) else batch.now
    tokens = batch.tokens_of_step(size)
    if tokens is None:
        return wanted, saved
    return _in_steps(wanted, tokens), _in_steps(saved, tokens)


def _in_steps(curve: Mapping[str, Any], tokens_per_step: int) -> dict[str, Any]:
    """Return a curve with its lengths in steps, rounded up as `durations` does."""
    found = {}
    for key, value in curve.items():
        if key.endswith(_TOKENS) and type(value) is int:
            key, value = f"{_stem(key)}{_STEPS}", -(-value // tokens_per_step)
        found[key] = value
    return found


def _blame_batch(
    changed: Sequence[str], saved: Mapping[str, Any], batch: BatchChange | None
) -> str:
    """Name the batch where a length differs and the batch does, with what would keep the curve."""
    lengths = sorted({_stem(key) for key in changed if key.endswith((_STEPS, _TOKENS))})
    if batch is None or batch.saved in (None, batch.now) or not lengths:
        return ""
    tokens = batch.tokens_of_step(batch.saved)
    flags = []
    for stem in lengths:
        value, steps = saved.get(f"{stem}{_TOKENS}"), saved.get(f"{stem}{_STEPS}")
        if value is None and tokens is not None and type(steps) is int:
            value = steps * tokens
        if value:
            flags.append(f"--{stem.replace('_', '-')}-tokens {value}")
    remedy = f"; to keep the checkpoint's curve give {' '.join(flags)}" if flags else ""
    return (
        f" (the global batch was {batch.saved} sequences and is {batch.now} now, so a length in"
        f" steps is another one in tokens{remedy})"
    )


def branch_rate(run: Mapping[str, Any], *, where: object) -> float:
    """Return the learning rate that a branch from a checkpoint begins with.

    Args:
        run: What `run_state` said when the checkpoint was written.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: The checkpoint does not say it.
    """
    rate = run.get("learning_rate")
    if not isinstance(rate, float) or rate <= 0:
        raise CheckpointError(
            f"{where} says that its next learning rate is {rate}; a branch begins with it, so it"
            " must be a number above 0; branch from another checkpoint"
        )
    return rate


def rate_of_branch(saved: Mapping[str, Any], *, anneal_from: int, where: object) -> float:
    """Return the learning rate that a continued branch began with.

    Args:
        saved: The schedule in its checkpoint.
        anneal_from: What this run says it branched from.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: The checkpoint is of no such branch.
    """
    start, rate = saved.get("anneal_from"), saved.get("anneal_lr")
    if start != anneal_from or not isinstance(rate, float):
        told = "of a run that is no branch" if start is None else f"of a branch from step {start}"
        raise CheckpointError(
            f"{where} is {told}, and --anneal-from is {anneal_from}; a branch has a directory of"
            " its own and the same --anneal-from for as long as it runs; give --save another"
            " directory"
        )
    return rate
