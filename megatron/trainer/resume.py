"""Saves the state of a run, and resumes from a checkpoint: by `state`, through `checkpoint`."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.trainer.checkpoint import (
    BackgroundSaver,
    FoundCheckpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.trainer.checkpoint.origin import decide_origin, has_checkpoints
from megatron.trainer.checkpoint.saved_run import (
    RUN_NAME,
    WEIGHTS_ONLY,
    Architecture,
    check_architecture,
    check_fixed,
    check_optimizer,
    read_run,
    saved_config,
)
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.data.carried_files import collect_files
from megatron.trainer.errors import CheckpointError
from megatron.trainer.optim.scheduler import LRSchedule, branch_rate, rate_of_branch
from megatron.trainer.optim.sharded_state import OPTIMIZER_PREFIX
from megatron.trainer.records.record_file import has_evaluation
from megatron.trainer.records.run_dir import CONFIG_NAME, METRICS_NAME
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.state import (
    RNG_PREFIX,
    TrainState,
    apply_state,
    batch_change,
    load_model,
    model_state,
    request_state,
    run_state,
    sharded_state,
    take_data,
)

logger = logging.getLogger(__name__)


def checkpoint_writer(
    state: TrainState,
    background: BackgroundSaver | None = None,
    *,
    loaded: FoundCheckpoint | None = None,
) -> Callable[[TrainState], None] | None:
    """Return the function that saves a checkpoint, or begins to; None for a run without --save.

    Args:
        state: of the run.
        background: writes in the background; None returns a function that does so itself.
        loaded: the checkpoint that it began from, whose tokenizer and origin are kept on.
    """
    cfg = state.cfg.checkpoint
    if cfg.save is None:
        return None
    root = Path(cfg.save)
    files: dict[str, str | bytes] = {}

    def collect() -> None:
        path, saved = (None, {}) if loaded is None else (loaded.path, saved_config(loaded))
        carried = collect_files(state.cfg.data, path, saved)
        cfg_to_save = dataclasses.replace(state.cfg, data=carried.data)
        files.update({**carried.files, CONFIG_NAME: dump_config(cfg_to_save)})

    # Rank 0 alone writes them.
    on_rank0("reading the tokenizer", collect)

    def write(current: TrainState) -> None:
        run = json.dumps(run_state(current), indent=2)
        save = save_checkpoint if background is None else background.save
        path = save(
            root,
            current.iteration,
            sharded_state(current),
            files={**files, RUN_NAME: run},
            keep_last=cfg.keep_last,
            keep_every=cfg.keep_every,
        )
        if path is not None:
            logger.info("saved %s", path)

    return write


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Holds what a run started from."""

    event: str
    """`start`, `resume` or `branch`, as in events.jsonl."""
    detail: str
    """The same in words."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that are not valid, each with its first problem."""
    is_continued: bool = False
    """The run continues in its own directory, from a checkpoint."""
    loaded: FoundCheckpoint | None = None
    """The checkpoint that it began from, if any."""


def resume(state: TrainState, model_config: Architecture) -> Beginning:
    """Continue from `--load`; do nothing for a fresh run.

    A run directory given to --load and --save alike may be empty: the first job of a chain. Any
    other --save must not hold a run already, unless it is a branch, or this very command has begun
    the run, as where torchrun restarts the ranks: then that run is continued. A checkpoint of
    weights alone, as a conversion writes it, has nothing else to continue from: it starts the run
    as --finetune would.

    Args:
        state: freshly built; changed in place.
        model_config: this run's model group, compared with the checkpoint's.

    Returns:
        What was found.
    """
    cfg = state.cfg.checkpoint
    origin = decide_origin(state.cfg)
    load, is_continued = origin.load, origin.is_continued
    if origin.is_repeated:
        cfg = dataclasses.replace(cfg, finetune=False, ckpt_step=None)
        logger.info("this command began the run in %s and saved there: going on with it", load)
    is_branching = cfg.anneal_from is not None and not is_continued
    if load is None:
        return Beginning(event="start", detail="from initial weights")
    if is_continued and not origin.has_checkpoints:
        logger.info("no checkpoint in %s yet: starting from iteration 0", load)
        return Beginning(event="start", detail="from initial weights")
    found = find_checkpoint(load, iteration=cfg.anneal_from if is_branching else cfg.ckpt_step)
    run, lacking = on_rank0(
        f"reading the configuration in {found.path}",
        lambda: _read_run(
            found,
            model_config,
            finetune=cfg.finetune,
            check_saved=state.check_saved,
            optimizer=state.cfg.optimizer.optimizer,
            fixed=state.fixed,
        ),
    )
    skipped = tuple(f"{path.name}: {problems[0]}" for path, problems in found.skipped)
    if run is None or run.get(WEIGHTS_ONLY) is True:
        _take_weights(state, found, lacking)
        return Beginning(
            event="start",
            detail=f"from the weights of {found.path}",
            skipped=skipped,
            loaded=found,
        )
    if state.anneal is not None:
        state.schedule = _branch_schedule(state, run, found, is_branching)
    _take_state(state, found, run, is_branching=is_branching)
    logger.info(
        "%s %s at iteration %d, %d samples consumed, learning rate %g",
        "branched from" if is_branching else "resumed",
        found.path,
        state.iteration,
        state.train_data.consumed_samples,
        state.learning_rate,
    )
    changed = None if is_branching else batch_change(state, run).describe(state.plan)
    if changed is not None and not state.is_done:
        # Other ranks log warnings only.
        logger.log(logging.WARNING if state.ctx.rank == 0 else logging.INFO, changed)
    if state.is_done:
        logger.warning(
            "the run has done its length already, %d steps of %d tokens in all; nothing is left to"
            " train",
            state.iteration,
            state.progress.tokens,
        )
    return Beginning(
        event="branch" if is_branching else "resume",
        detail=f"from {found.path}",
        skipped=skipped,
        is_continued=is_continued,
        loaded=found,
    )


def _take_state(
    state: TrainState, found: FoundCheckpoint, run: Mapping[str, Any], *, is_branching: bool = False
) -> None:
    """Restore everything that a checkpoint of a training run holds."""
    request = request_state(state, run, is_branching=is_branching)
    take_data(state, run, is_branching=is_branching)
    # Another layout, or a branch, leaves the random states unread.
    loaded = load_checkpoint(found.path, request, unread_prefixes=(RNG_PREFIX,))
    apply_state(state, loaded, run)


def rewind(state: TrainState, newest: int) -> bool:
    """Go back to the newest valid checkpoint in `--save`, and leave out the samples drawn since.

    The schedule goes on from the checkpoint's step with samples that the run has
    not seen, and no phase gets shorter. Called by every rank.

    Args:
        state: changed in place.
        newest: iteration of the newest checkpoint that this job wrote or began from; later ones are
            of a run that was rolled back.

    Returns:
        False where this is not wanted, was done too often, or there is no checkpoint.
    """
    cfg = state.cfg
    if not cfg.reliability.rewind_on_spike or cfg.checkpoint.save is None:
        return False
    root = Path(cfg.checkpoint.save)
    if not on_rank0(f"looking into {root}", lambda: has_checkpoints(root, upto=newest)):
        return False
    found = find_checkpoint(root, upto=newest)
    run = on_rank0(f"reading {found.path / RUN_NAME}", lambda: read_run(found))
    if run.get(WEIGHTS_ONLY) is True or not state.guard.may_rewind(found.iteration):
        return False
    rewinds, drawn = dict(state.guard.rewinds), state.train_data.consumed_per_source()
    _take_state(state, found, run)
    state.guard.rewinds = rewinds
    kept = state.train_data.consumed_per_source()
    left_out = {name: count - kept.get(name, 0) for name, count in drawn.items()}
    state.train_data.skip(left_out)
    logger.log(
        logging.WARNING if state.ctx.rank == 0 else logging.INFO,  # other ranks log warnings only
        "went back to %s; %d samples read since are left out (rewind %d of --max-rewinds %d)",
        found.path,
        sum(left_out.values()),
        rewinds[found.iteration],
        cfg.reliability.max_rewinds,
    )
    return True


def evaluation_is_pending(state: TrainState) -> bool:
    """Return whether the previous job was stopped in this step's evaluation; a collective call."""
    cfg = state.cfg
    if cfg.checkpoint.save is None or not (state.validation or state.tasks):
        return False
    interval, iteration = cfg.evaluation.eval_interval, state.iteration
    is_due = (interval > 0 and iteration % interval == 0) or state.is_done
    metrics = Path(cfg.checkpoint.save) / METRICS_NAME
    return is_due and on_rank0(
        f"reading {metrics}",
        lambda: not has_evaluation(metrics, iteration),
    )


def check_directories(cfg: RunConfig) -> None:
    """Refuse, before anything is written to it, a `--save` that holds another run.

    Raises:
        CheckpointError: on every rank, as `resume` would.
    """
    decide_origin(cfg)


def _take_weights(state: TrainState, found: FoundCheckpoint, lacking: tuple[str, ...]) -> None:
    """Start a run from weights alone."""
    if state.anneal is not None:
        raise CheckpointError(
            f"{found.path} holds weights alone, and --anneal-from takes the optimizer state and the"
            " learning rate with them; branch from a checkpoint of a training run, or start a new"
            " schedule without --anneal-from"
        )
    load_weights(state.modules, found, lacking=lacking)
    state.optimizer.reload_model_params()
    logger.info("loaded the weights of %s; iteration, optimizer and data start afresh", found.path)


def _branch_schedule(
    state: TrainState, run: Mapping[str, Any], found: FoundCheckpoint, is_branching: bool
) -> LRSchedule:
    """Return the schedule of a branch, which begins with the learning rate of its trunk.

    Raises:
        CheckpointError: the checkpoint does not say it, or is of another branch.
        ConfigError: the tail cannot begin there.
    """
    start = state.cfg.checkpoint.anneal_from
    assert state.anneal is not None and start is not None  # both or neither, see build_state
    if is_branching:
        return state.anneal(branch_rate(run, where=found.path))
    return state.anneal(rate_of_branch(run["schedule"], anneal_from=start, where=found.path))


def load_weights(
    modules: list[torch.nn.Module], found: FoundCheckpoint, *, lacking: tuple[str, ...] = ()
) -> None:
    """Fill unwrapped model chunks from a checkpoint, for tools that do not train.

    Args:
        modules: this rank's chunks.
        found: the checkpoint.
        lacking: weights with one of these in their names are not in it, and stay as they are.
    """
    request = {
        chunk: {
            name: value
            for name, value in weights.items()
            if not any(part in name for part in lacking)
        }
        for chunk, weights in model_state(modules).items()
    }
    loaded = load_checkpoint(found.path, request, unread_prefixes=(OPTIMIZER_PREFIX, RNG_PREFIX))
    load_model(modules, loaded, lacking=lacking)


def _read_run(
    found: FoundCheckpoint,
    model: Architecture,
    *,
    finetune: bool,
    check_saved: Callable[[Mapping[str, Any], bool], tuple[str, ...]] | None,
    optimizer: str,
    fixed: Mapping[str, Mapping[str, str]],
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Check that a checkpoint fits.

    Returns:
        Its run.json, None where only weights are wanted; and what it lacks, as `check_saved` and
        the model say.
    """
    saved = saved_config(found)
    added = check_architecture(found, model)
    run = None if finetune else read_run(found)
    is_continued = run is not None and run.get(WEIGHTS_ONLY) is not True
    if is_continued and added:
        raise CheckpointError(
            f"{found.path} is of a run without {', '.join(added)}, and a run that goes on keeps its"
            " settings; start from its weights alone with --finetune and another --save, where"
            " what they lack begins at 0, or leave the setting out"
        )
    if is_continued:
        check_optimizer(saved, optimizer)
    lacking = () if check_saved is None else check_saved(saved, is_continued)
    lacking += tuple(added.values())
    if run is not None:
        check_fixed(run, fixed)
    return run, lacking
