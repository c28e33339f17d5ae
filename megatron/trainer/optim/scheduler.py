"""Defines the learning-rate schedule's interface, and which one a resumed run may follow."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from megatron.trainer.errors import CheckpointError

logger = logging.getLogger(__name__)

_EXTENSIBLE = {"lr_decay_iters", "lr_wsd_decay_iters"}
"""What may change in a WSD schedule before its decay begins."""


class LRSchedule(Protocol):
    """Maps steps done to the learning rate of the next step."""

    def __call__(self, step: int) -> float:
        """Return the learning rate of step number `step`, counted from 0."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Its shape and lengths by the names of their flags, kept in checkpoints."""
        ...


def check_schedule(
    wanted: Mapping[str, Any], saved: Mapping[str, Any], *, iteration: int, override: bool
) -> None:
    """Refuse to continue under another learning-rate curve, unless `override` asks for it.

    Before the decay of a WSD schedule begins, its begin and its end may be moved: the steps done
    are the same.

    Args:
        wanted: This run's schedule, as its state_dict gives it.
        saved: The checkpoint's.
        iteration: Steps done.
        override: Take this run's schedule whatever the checkpoint's is.

    Raises:
        CheckpointError: They differ; every difference is listed.
    """
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
    early = ""
    if set(changed) <= _EXTENSIBLE and wanted.get("lr_decay_style") == "WSD":
        begins = [
            curve["lr_decay_iters"] - curve["lr_wsd_decay_iters"]
            for curve in (saved, wanted)
            if all(type(curve.get(key)) is int for key in _EXTENSIBLE)
        ]
        if len(begins) == 2 and iteration <= min(begins):
            logger.info(
                "the decay begins at step %d instead of %d, which is still to come: %s",
                begins[1],
                begins[0],
                told,
            )
            return
        if len(begins) == 2:
            early = (
                f" (the decay would begin at step {begins[1]}, the checkpoint's at {begins[0]}, and"
                f" {iteration} steps are done: it can be moved only before it begins, to a step"
                " still to come)"
            )
    raise CheckpointError(
        f"the checkpoint follows another learning-rate schedule: {told}{early}. Give this run the"
        " checkpoint's values (--lr-decay-iters is --train-iters where it is not given), follow"
        " this run's from here on with --override-schedule, or start a new schedule from the"
        " weights with --finetune"
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
