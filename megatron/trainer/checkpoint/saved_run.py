"""Reads the small files that a run keeps in its checkpoints: its configuration, and run.json."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from megatron.trainer.checkpoint.compare_config import compare_configs, config_mismatch
from megatron.trainer.checkpoint.find import FoundCheckpoint
from megatron.trainer.checkpoint.load import read_text
from megatron.trainer.config.recipe import plain_values
from megatron.trainer.errors import CheckpointError
from megatron.trainer.records.run_dir import CONFIG_NAME

RUN_NAME = "run.json"
_RUN_TYPES = {
    "data": dict,
    "iteration": int,
    "layout": dict,
    "optimizer_steps": int,
    "schedule": dict,
}
"""Types of what run.json must hold."""
_LARGEST_COUNT = 1 << 62
WEIGHTS_ONLY = "weights_only"
"""Key of run.json: true where a checkpoint holds weights and nothing else of a run."""


def saved_config(found: FoundCheckpoint) -> dict[str, Any]:
    """Read the flat config of the run that wrote the checkpoint.

    Raises:
        CheckpointError: config.yaml is no mapping of settings.
    """
    try:
        config = plain_values(read_text(found.path, CONFIG_NAME))
    except ValueError as error:
        raise CheckpointError(
            f"{found.path / CONFIG_NAME} cannot be read as plain YAML: {error}; restore it from the"
            " run directory"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{found.path / CONFIG_NAME} holds {type(config).__name__}, not a mapping of settings;"
            " restore it from the run directory"
        )
    return config


class Architecture(Protocol):
    """Describes the model group of a run to what loads a checkpoint."""

    def architecture(self) -> dict[str, object]:
        """Return the fields that a checkpoint and the run that loads it must share."""
        ...

    def addable(self, saved: Mapping[str, Any]) -> Mapping[str, str]:
        """Return settings that weights of another run can get, and what their own are called."""
        ...

    def before_added(self) -> Mapping[str, object]:
        """Return what fields were, in effect, in runs of the versions that lacked them."""
        ...


def check_architecture(found: FoundCheckpoint, model: Architecture) -> Mapping[str, str]:
    """Refuse a checkpoint of another architecture, but for settings that weights can get later.

    Args:
        found: the checkpoint.
        model: what it must be of.

    Returns:
        Settings that the checkpoint lacks, and parts of the names of what it therefore lacks: the
        model's `addable`. What takes the weights begins those at 0, or refuses.

    Raises:
        CheckpointError: some other field of the architecture differs; lists every difference.
    """
    own = saved_config(found)
    added = model.addable(own)
    saved = {**model.before_added(), **own}
    wanted = {key: value for key, value in model.architecture().items() if key not in added}
    differences = compare_configs({key: saved.get(key) for key in wanted}, wanted)
    if differences:
        raise config_mismatch(found.path, differences)
    return added


def check_optimizer(saved: Mapping[str, Any], wanted: str) -> None:
    """Refuse the optimizer state of another optimizer.

    All optimizers keep theirs in one form, so that it could be loaded, and would be taken for what
    it is not.

    Args:
        saved: flat config of the run in the checkpoint; without an optimizer it is of before there
            was a choice.
        wanted: optimizer of the run that goes on.

    Raises:
        CheckpointError: it is another one.
    """
    before = saved.get("optimizer", "adam")
    if before != wanted:
        raise CheckpointError(
            f"the checkpoint holds the optimizer state of --optimizer {before}, and this run has"
            f" --optimizer {wanted}, to which it means something else; give --optimizer {before},"
            " or start from the weights alone with --finetune and another --save"
        )


def check_fixed(run: Mapping[str, Any], wanted: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to go on beside other files than those that a run began with.

    Args:
        run: what `state.run_state` said; a run of before this was noted is not compared.
        wanted: `TrainState.fixed` of the run that goes on.

    Raises:
        CheckpointError: some file is another.
    """
    noted = run.get("fixed")
    for name, now in wanted.items():
        before = noted.get(name) if isinstance(noted, dict) else None
        if isinstance(before, dict) and before.get("sha256") != now["sha256"]:
            raise CheckpointError(
                f"the {name} of the run in the checkpoint is {before.get('path')!r:.300}, with a"
                f" manifest of SHA-256 {before.get('sha256')!s:.12}, and this run's is"
                f" {now['path']}, with {now['sha256']:.12}; name the one that it began with, or"
                " begin a new run with another --save"
            )


def read_run(found: FoundCheckpoint) -> dict[str, Any]:
    """Read run.json, which `state.run_state` made when the checkpoint was written.

    Raises:
        CheckpointError: it is no such object.
    """
    where = found.path / RUN_NAME
    try:
        run = json.loads(read_text(found.path, RUN_NAME))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if isinstance(run, dict) and run.get(WEIGHTS_ONLY) is True:
        return dict(run)
    remedy = "take only the weights with --finetune, or load another checkpoint with --ckpt-step"
    missing = [key for key in _RUN_TYPES if not isinstance(run, dict) or key not in run]
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(missing)}; it must hold {', '.join(_RUN_TYPES)}; {remedy}"
        )
    for key, kind in _RUN_TYPES.items():
        if type(run[key]) is not kind or (kind is int and not 0 <= run[key] < _LARGEST_COUNT):
            raise CheckpointError(
                f"{where} has {key} {run[key]!r:.80}; it must be"
                f" {'a number of steps' if kind is int else 'an object'}; {remedy}"
            )
    return dict(run)
