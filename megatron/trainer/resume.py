"""The run's state to and from checkpoints: what `state` describes, written by `checkpoint`."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from megatron.trainer.checkpoint import (
    FoundCheckpoint,
    compare_configs,
    config_mismatch,
    find_checkpoint,
    load_checkpoint,
    read_text,
    save_checkpoint,
)
from megatron.trainer.checkpoint.layout import final_iterations, stranded
from megatron.trainer.config import CheckpointConfig
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.launch import agree
from megatron.trainer.load import dump_config
from megatron.trainer.optim_state import OPTIMIZER_PREFIX
from megatron.trainer.schedule import Schedule, branch_rate, rate_of_branch
from megatron.trainer.state import (
    RNG_PREFIX,
    TrainState,
    apply_state,
    load_model,
    model_state,
    request_state,
    run_state,
    sharded_state,
    take_data,
)

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
RUN_NAME = "run.json"
WEIGHTS_ONLY = "weights_only"
"""Key of run.json: true where a checkpoint holds weights and nothing else of a run."""


def checkpoint_writer(state: TrainState) -> Callable[[TrainState], None] | None:
    """What `loop.train` calls to save; None when the run saves nothing."""
    cfg = state.cfg.checkpoint
    if cfg.save is None:
        return None
    root = Path(cfg.save)
    files: dict[str, str | Path] = {CONFIG_NAME: dump_config(state.cfg)}
    if state.cfg.data.tokenizer_model is not None and not state.cfg.data.mock_data:
        tokenizer = Path(state.cfg.data.tokenizer_model)
        agree(lambda: _require_tokenizer(tokenizer))
        files[tokenizer.name] = tokenizer

    def write(current: TrainState) -> None:
        run = json.dumps(run_state(current), indent=2)
        path = save_checkpoint(
            root,
            current.iteration,
            sharded_state(current),
            files={**files, RUN_NAME: run},
            keep_last=cfg.keep_last,
        )
        logger.info("saved %s", path)

    return write


class Architecture(Protocol):
    """What `resume` asks of a run's model group."""

    def architecture(self) -> dict[str, object]:
        """The fields a checkpoint and the run that loads it must share."""
        ...


def resume(state: TrainState, model_config: Architecture) -> None:
    """Continue from `--load`; do nothing for a fresh run.

    A run directory given to --load and --save alike may be empty: the first job of a chain. Any
    other --save must not hold a run already, but for the one of a branch: the command that began
    the branch continues it. A checkpoint of weights alone, as a conversion writes it, has nothing
    else to continue from: it starts the run as --finetune would.

    Args:
        state: freshly built; changed in place.
        model_config: this run's model group, compared with the checkpoint's.
    """
    cfg = state.cfg.checkpoint
    load, is_continued = _where_from(cfg)
    is_branching = cfg.anneal_from is not None and not is_continued
    if load is None:
        return
    if is_continued and not _has_checkpoints(load):
        logger.info("no checkpoint in %s yet: starting from iteration 0", load)
        return
    found = find_checkpoint(load, iteration=cfg.anneal_from if is_branching else cfg.ckpt_step)
    agree(lambda: check_architecture(found, model_config.architecture()))
    run = None if cfg.finetune else agree(lambda: _saved_run(found))
    if run is None or run.get(WEIGHTS_ONLY) is True:
        _take_weights(state, found)
        return
    if state.anneal is not None:
        state.schedule = agree(lambda: _branch_schedule(state, run, found, is_branching))
    request = request_state(state, run, is_branching=is_branching)
    take_data(state, run, is_branching=is_branching)
    # Another layout, or a branch, leaves the random states unread.
    loaded = load_checkpoint(found.path, request, unread_prefixes=(RNG_PREFIX,))
    apply_state(state, loaded, run)
    logger.info(
        "%s %s at iteration %d, %d samples consumed, learning rate %g",
        "branched from" if is_branching else "resumed",
        found.path,
        state.iteration,
        state.train_data.consumed_samples,
        state.schedule(state.iteration),
    )
    if state.iteration >= state.cfg.training.train_iters:
        logger.warning(
            "the run has done its --train-iters %d already; nothing is left to train",
            state.cfg.training.train_iters,
        )


def _where_from(cfg: CheckpointConfig) -> tuple[Path | None, bool]:
    """The directory to load from, and whether it is the one that is saved to.

    Raises:
        CheckpointError: --save holds another run, or a branch cannot begin; on every rank.
    """
    save = Path(cfg.save) if cfg.save is not None else None
    load = Path(cfg.load) if cfg.load is not None else None
    is_continued = save is not None and load is not None and save.resolve() == load.resolve()
    if cfg.anneal_from is not None:
        if save is not None and _has_checkpoints(save):
            return save, True
        agree(lambda: _check_branch_start(cfg, is_continued))
    if save is not None and (cfg.finetune or not is_continued):
        agree(lambda: _refuse_to_overwrite(save))
    return load, is_continued


def _take_weights(state: TrainState, found: FoundCheckpoint) -> None:
    """Start a run from weights alone."""
    if state.anneal is not None:
        raise CheckpointError(
            f"{found.path} holds weights alone, and --anneal-from takes the optimizer state and the"
            " learning rate with them; branch from a checkpoint of a training run, or start a new"
            " schedule without --anneal-from"
        )
    load_weights(state.modules, found)
    state.optimizer.reload_model_params()
    logger.info("took the weights of %s; iteration, optimizer and data start anew", found.path)


def _check_branch_start(cfg: CheckpointConfig, is_own_directory: bool) -> None:
    """Refuse to begin a branch from nothing, or from two checkpoints."""
    if is_own_directory:
        raise CheckpointError(
            f"{cfg.load} is given to --load and --save alike and holds no checkpoint, so there is"
            f" no branch to continue; begin it with --load set to the run that has iteration"
            f" {cfg.anneal_from}"
        )
    if cfg.ckpt_step is not None:
        raise CheckpointError(
            f"--ckpt-step {cfg.ckpt_step} chooses a checkpoint of the branch, but {cfg.save} holds"
            f" none; a branch begins at --anneal-from {cfg.anneal_from}; leave --ckpt-step out"
        )


def _branch_schedule(
    state: TrainState, run: Mapping[str, Any], found: FoundCheckpoint, is_branching: bool
) -> Schedule:
    """The schedule of a branch, which begins with the learning rate of the run it left.

    Raises:
        CheckpointError: the checkpoint does not say it, or is of another branch.
        ConfigError: the tail cannot begin there.
    """
    start = state.cfg.checkpoint.anneal_from
    assert state.anneal is not None and start is not None  # both or neither, see build_state
    if is_branching:
        return state.anneal(branch_rate(run, where=found.path))
    return state.anneal(rate_of_branch(run["schedule"], anneal_from=start, where=found.path))


def load_weights(modules: list[torch.nn.Module], found: FoundCheckpoint) -> None:
    """Fill unwrapped model chunks from a checkpoint, for tools that do not train."""
    loaded = load_checkpoint(
        found.path, model_state(modules), unread_prefixes=(OPTIMIZER_PREFIX, RNG_PREFIX)
    )
    load_model(modules, loaded)


def saved_config(found: FoundCheckpoint) -> dict[str, Any]:
    """The flat config that wrote the checkpoint."""
    try:
        config = yaml.safe_load(read_text(found.path, CONFIG_NAME))
    except yaml.YAMLError as error:
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


def check_architecture(found: FoundCheckpoint, wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another architecture, listing every difference."""
    saved = saved_config(found)
    differences = compare_configs({key: saved.get(key) for key in wanted}, wanted)
    if differences:
        raise config_mismatch(found.path, differences)


def _saved_run(found: FoundCheckpoint) -> dict[str, Any]:
    """What `run_state` said when the checkpoint was written."""
    try:
        run = json.loads(read_text(found.path, RUN_NAME))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{found.path / RUN_NAME} is not JSON: {error}") from error
    if isinstance(run, dict) and run.get(WEIGHTS_ONLY) is True:
        return dict(run)
    wanted = ("data", "iteration", "layout", "optimizer_steps", "schedule")
    missing = [key for key in wanted if not isinstance(run, dict) or key not in run]
    if missing:
        raise CheckpointError(
            f"{found.path / RUN_NAME} lacks {', '.join(missing)}; it must hold"
            f" {', '.join(wanted)}; take only the weights with --finetune, or load another"
            " checkpoint with --ckpt-step"
        )
    return dict(run)


def _require_tokenizer(tokenizer: Path) -> None:
    if not tokenizer.is_file():
        raise DataError(
            f"--tokenizer-model {tokenizer} does not exist; checkpoints carry the tokenizer with"
            " them; check the path, or leave the flag away"
        )


def _has_checkpoints(root: Path) -> bool:
    return root.is_dir() and bool(final_iterations(root) or stranded(root))


def _refuse_to_overwrite(save: Path) -> None:
    if _has_checkpoints(save) or (save / "metrics.jsonl").exists():
        raise CheckpointError(
            f"{save} holds an earlier run; continue it with --load {save} (without --finetune), or"
            " give --save another directory"
        )
