"""Says which settings a run keeps as long as it goes on: its stage, and what it minimizes."""

from collections.abc import Mapping
from typing import Any

from megatron.trainer.errors import CheckpointError

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "fine-tuning": ("loss_reduction",),
    "alignment": (
        *("method", "beta", "label_smoothing", "average_log_prob"),
        *("desirable_weight", "undesirable_weight"),
    ),
}
"""Settings of each stage's objective; pretraining has none."""
_PRETRAINING = "pretraining"
_ROUTER_LOSSES = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
"""Part of the objective after pretraining, where they are 0 unless flags say otherwise: left out by
mistake, they would be off from there on."""


def check_stage(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another stage or another objective.

    Args:
        saved: flat config of the run in the checkpoint.
        wanted: that of this one.

    Raises:
        CheckpointError: something differs.
    """
    before, now = _stage_of(saved), _stage_of(wanted)
    if before != now:
        raise CheckpointError(
            f"the checkpoint is of a run of {before}, and this is one of {now}, which cannot go on"
            " with it; begin a new run from its weights: --load the checkpoint's directory,"
            f" --save another one{' and --finetune' if now == _PRETRAINING else ''}"
        )
    names = (*OBJECTIVES[now], *_ROUTER_LOSSES) if now in OBJECTIVES else ()
    changed = [
        f"{name} was {saved[name]!s:.60} and is {wanted[name]}"
        for name in names
        if name in saved and saved[name] != wanted[name]
    ]
    if changed:
        raise CheckpointError(
            f"a run of {now} minimizes the same as long as it goes on, but {', '.join(changed)};"
            " give the checkpoint's values, or begin a new run from its weights with another --save"
        )


def _stage_of(values: Mapping[str, Any]) -> str:
    found = (stage for stage, names in OBJECTIVES.items() if names[0] in values)
    return next(found, _PRETRAINING)
