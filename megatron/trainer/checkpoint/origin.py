"""Decides what a run starts from, by what --save and --load hold."""

from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.checkpoint import layout
from megatron.trainer.checkpoint.compare_config import compare_configs
from megatron.trainer.checkpoint.load import read_text
from megatron.trainer.checkpoint.stages import on_rank0
from megatron.trainer.config.recipe import dump_config, plain_values
from megatron.trainer.config.schema import CheckpointConfig, RunConfig
from megatron.trainer.errors import CheckpointError
from megatron.trainer.records.record_file import read_records
from megatron.trainer.records.run_dir import CONFIG_NAME, EVENTS_NAME, METRICS_NAME

_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Says where a run starts from."""

    load: Path | None
    """The directory to load from; None begins with initial weights."""
    is_continued: bool
    """It is the one that is saved to."""
    has_checkpoints: bool
    """Says whether a continued run finds any there."""
    is_repeated: bool = False
    """This very command, which loads from elsewhere or takes weights alone, has begun the run and
    saved: it goes on with it, as --load of the run's own directory would."""


def decide_origin(cfg: RunConfig) -> Origin:
    """Read on rank 0 what --save and --load hold; a collective call.

    Raises:
        CheckpointError: --save holds another run, or a branch cannot begin; on every rank.
    """
    return on_rank0("looking into --save and --load", lambda: _origin(cfg))


def has_checkpoints(root: Path, *, upto: int | None = None) -> bool:
    """Return whether a run directory holds a checkpoint, valid or not.

    Args:
        root: the directory, which need not be there.
        upto: look for none of a later iteration.
    """
    return any(upto is None or iteration <= upto for iteration in _checkpoints(root))


def _checkpoints(root: Path) -> dict[int, Path]:
    """Return the checkpoints of a run directory by iteration, the newest first."""
    if not root.is_dir():
        return {}
    finals = {number: layout.final_path(root, number) for number in layout.final_iterations(root)}
    return dict(sorted({**finals, **layout.stranded(root)}.items(), reverse=True))


def _origin(cfg: RunConfig) -> Origin:
    flags = cfg.checkpoint
    save = Path(flags.save) if flags.save is not None else None
    load = Path(flags.load) if flags.load is not None else None
    is_continued = save is not None and load is not None and save.resolve() == load.resolve()
    if flags.anneal_from is not None:
        if save is not None and has_checkpoints(save):
            return Origin(load=save, is_continued=True, has_checkpoints=True)
        _check_branch_start(flags, is_continued)
    if save is not None and (flags.finetune or not is_continued):
        differences = _differences(cfg, save) if load is not None else None
        if differences == []:
            return Origin(load=save, is_continued=True, has_checkpoints=True, is_repeated=True)
        _refuse_to_overwrite(save, differences, is_from_elsewhere=load is not None)
    return Origin(
        load=load,
        is_continued=is_continued,
        has_checkpoints=is_continued and load is not None and has_checkpoints(load),
    )


def _differences(cfg: RunConfig, save: Path) -> list[str] | None:
    """Compare this run's settings with those of the run that wrote the newest checkpoint.

    Returns:
        A line for each setting that differs, none for the same command; None without a checkpoint
        whose settings can be read.
    """
    for path in _checkpoints(save).values():
        try:
            saved = plain_values(read_text(path, CONFIG_NAME))
        except (CheckpointError, ValueError):
            continue
        wanted = plain_values(dump_config(cfg))
        if isinstance(saved, dict) and isinstance(wanted, dict):
            return compare_configs(saved, wanted)
    return None


def _check_branch_start(flags: CheckpointConfig, is_own_directory: bool) -> None:
    """Refuse to begin a branch from nothing, or from two checkpoints."""
    if is_own_directory:
        raise CheckpointError(
            f"{flags.load} is given to --load and --save alike and holds no checkpoint, so there is"
            f" no branch to continue; begin it with --load set to the run that has iteration"
            f" {flags.anneal_from}"
        )
    if flags.ckpt_step is not None:
        raise CheckpointError(
            f"--ckpt-step {flags.ckpt_step} chooses a checkpoint of the branch, but {flags.save}"
            f" holds none; a branch begins at --anneal-from {flags.anneal_from}; leave --ckpt-step"
            " out"
        )


def _refuse_to_overwrite(
    save: Path, differences: list[str] | None, *, is_from_elsewhere: bool
) -> None:
    """Refuse a directory that holds another run.

    A job that started from another run's checkpoint and ended before its first save leaves records
    but no checkpoint. It starts again, by the same command.
    """
    events = read_records(save / EVENTS_NAME) if is_from_elsewhere else ()
    names = {event.get("event") for event in events}
    has_saved_nothing = bool(names) and "save" not in names
    if has_checkpoints(save) or ((save / METRICS_NAME).exists() and not has_saved_nothing):
        shown = (differences or [])[:_SHOWN_DIFFERENCES]
        more = ", ..." if len(differences or ()) > len(shown) else ""
        raise CheckpointError(
            f"{save} holds an earlier run; continue it with --load {save} (without --finetune), or"
            " give --save another directory"
            + (f"; another command began it: {', '.join(shown)}{more}" if shown else "")
        )
