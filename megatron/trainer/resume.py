"""The run's state to and from checkpoints: what `state` describes, written by `checkpoint`."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.trainer.checkpoint import (
    FoundCheckpoint,
    compare_configs,
    find_checkpoint,
    load_checkpoint,
    read_text,
    save_checkpoint,
)
from megatron.trainer.config import CheckpointConfig
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.launch import agree
from megatron.trainer.load import dump_config
from megatron.trainer.optim_state import OPTIMIZER_PREFIX
from megatron.trainer.state import (
    RNG_PREFIX,
    TrainState,
    apply_state,
    load_model,
    model_state,
    request_state,
    run_state,
    sharded_state,
)

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
_RUN_NAME = "run.json"


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
            files={**files, _RUN_NAME: run},
            keep_last=cfg.keep_last,
        )
        logger.info("saved %s", path)

    return write


def resume(state: TrainState, model_config: object) -> None:
    """Continue from `--load`, or from this run's own directory; do nothing for a fresh run.

    A run directory given to --load and --save alike may be empty: the first job of a chain.

    Args:
        state: freshly built; changed in place.
        model_config: the dataclass of this run's architecture, compared with the checkpoint's.
    """
    cfg = state.cfg.checkpoint
    if cfg.load is None:
        _refuse_to_overwrite(cfg)
        return
    if cfg.load == cfg.save and not _has_checkpoints(Path(cfg.load)):
        logger.info("no checkpoint in %s yet: starting from iteration 0", cfg.load)
        return
    found = find_checkpoint(Path(cfg.load), iteration=cfg.ckpt_step)
    agree(lambda: check_architecture(found, flatten_group(model_config)))
    if cfg.finetune:
        load_weights(state.modules, found)
        state.optimizer.reload_model_params()
        logger.info("took the weights of %s; iteration, optimizer and data start anew", found.path)
        return
    run = json.loads(read_text(found.path, _RUN_NAME))
    request = request_state(state, run)
    # Another layout leaves the random states unread.
    loaded = load_checkpoint(found.path, request, unread_prefixes=(RNG_PREFIX,))
    apply_state(state, loaded, run)
    logger.info(
        "resumed %s at iteration %d, %d samples consumed",
        found.path,
        state.iteration,
        state.train_data.consumed_samples,
    )


def load_weights(modules: list[torch.nn.Module], found: FoundCheckpoint) -> None:
    """Fill unwrapped model chunks from a checkpoint, for tools that do not train."""
    loaded = load_checkpoint(
        found.path, model_state(modules), unread_prefixes=(OPTIMIZER_PREFIX, RNG_PREFIX)
    )
    load_model(modules, loaded)


def saved_config(found: FoundCheckpoint) -> dict[str, Any]:
    """The flat config that wrote the checkpoint."""
    config = yaml.safe_load(read_text(found.path, CONFIG_NAME))
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{found.path / CONFIG_NAME} holds {type(config).__name__}, not a mapping of settings;"
            " restore it from the run directory"
        )
    return config


def flatten_group(group: object) -> dict[str, Any]:
    """One config group as the keys and values it has in a recipe."""
    return {name: value for name, value in vars(group).items() if not name.startswith("_")}


def check_architecture(found: FoundCheckpoint, wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another architecture, listing every difference."""
    saved = saved_config(found)
    differences = compare_configs({key: saved.get(key) for key in wanted}, wanted)
    if differences:
        raise CheckpointError(
            f"{found.path} holds another model:\n  "
            + "\n  ".join(differences)
            + f"\nGive this run the checkpoint's values (they are in {CONFIG_NAME} there)"
        )


def _require_tokenizer(tokenizer: Path) -> None:
    if not tokenizer.is_file():
        raise DataError(
            f"--tokenizer-model {tokenizer} does not exist; checkpoints carry the tokenizer with"
            " them; check the path, or leave the flag away"
        )


def _has_checkpoints(root: Path) -> bool:
    return any(root.glob("iter_*")) or (root / "latest_checkpointed_iteration.txt").exists()


def _refuse_to_overwrite(cfg: CheckpointConfig) -> None:
    if cfg.save is not None and _has_checkpoints(Path(cfg.save)):
        raise CheckpointError(
            f"{cfg.save} holds checkpoints of an earlier run; continue it with --load {cfg.save},"
            " or give --save another directory"
        )
