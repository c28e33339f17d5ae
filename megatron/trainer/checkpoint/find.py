"""Finds the checkpoint to continue from: the newest valid one, the same on every rank."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron.trainer.checkpoint import layout
from megatron.trainer.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    compare_files,
    read_manifest,
    require_visible,
    verify_manifest,
)
from megatron.trainer.checkpoint.stages import on_all_ranks, on_rank0
from megatron.trainer.errors import CheckpointError
from megatron.trainer.runtime.collective import gather, rank_of, size_of

_SHOWN_PROBLEMS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """Holds a valid checkpoint, and the candidates that were skipped before it."""

    path: Path
    iteration: int
    skipped: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    """Refused candidates in the order tried, each with its problems."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Holds what rank 0 sees in a run directory."""

    candidates: tuple[tuple[int, Path], ...]
    """Iteration and directory, best first."""
    tracked: int | None
    """The iteration that the tracker names."""
    tracker_problem: str | None


def find_checkpoint(
    root: Path,
    *,
    iteration: int | None = None,
    upto: int | None = None,
    compare_contents: bool = True,
    group: dist.ProcessGroup | None = None,
) -> FoundCheckpoint:
    """Find the checkpoint that the tracker names or, if it is not valid, the newest valid one.

    Called by every rank; rank 0 decides, the ranks share the reading. Every byte of the checkpoint
    that is returned was compared with its checksum, unless the caller does that while it reads.
    Skipped candidates are logged as warnings.

    Args:
        root: a run directory.
        iteration: take exactly this one instead, or fail.
        upto: take none of a later iteration.
        compare_contents: read every byte now; otherwise only names and sizes are compared.
        group: all ranks; None is the default group, or this process alone if there is none.

    Raises:
        CheckpointError: there is no valid checkpoint, or not the one asked for; or a rank does not
            see the files that rank 0 sees.
    """
    plan = on_rank0("looking for checkpoints", partial(_survey, root, iteration, upto), group)
    skipped: list[tuple[Path, tuple[str, ...]]] = []
    for number, path in plan.candidates:
        problems = _examine(path, number, group, compare_contents=compare_contents)
        if not problems:
            found = FoundCheckpoint(path=path, iteration=number, skipped=tuple(skipped))
            if rank_of(group) == 0:
                _report(found, plan)
            return found
        skipped.append((path, tuple(problems)))
    listed = "; ".join(f"{path.name}: {_shorten(problems)}" for path, problems in skipped)
    if iteration is not None:
        raise CheckpointError(
            f"the checkpoint of iteration {iteration} in {root} is damaged ({listed}); ask for "
            "another with --ckpt-step, or leave --ckpt-step out to take the newest valid one"
        )
    raise CheckpointError(
        f"no valid checkpoint in {root} ({listed}); restore one from a copy, or start without "
        "--load"
    )


def _survey(root: Path, iteration: int | None, upto: int | None) -> _Plan:
    """List the candidates on rank 0, best first.

    Raises:
        CheckpointError: there are none.
    """
    if not root.is_dir():
        raise CheckpointError(
            f"no checkpoint in {root}: no such directory; give --load the --save directory of an "
            "earlier run"
        )
    paths = {number: layout.final_path(root, number) for number in layout.final_iterations(root)}
    paths.update(layout.stranded(root))
    if upto is not None:
        paths = {number: path for number, path in paths.items() if number <= upto}
    newest_first = sorted(paths.items(), reverse=True)
    if not paths:
        raise CheckpointError(_nothing_there(root))
    if iteration is not None:
        if iteration not in paths:
            there = ", ".join(str(number) for number in sorted(paths))
            raise CheckpointError(
                f"{root} has no checkpoint of iteration {iteration}; it has {there}"
            )
        return _Plan(
            candidates=((iteration, paths[iteration]),), tracked=iteration, tracker_problem=None
        )
    tracked = layout.read_tracker(root)
    if isinstance(tracked, str):
        return _Plan(candidates=tuple(newest_first), tracked=None, tracker_problem=tracked)
    if tracked not in paths:
        what = "not there" if upto is None or tracked <= upto else f"later than {upto}"
        problem = f"{layout.TRACKER_NAME} names iteration {tracked}, which is {what}"
        return _Plan(candidates=tuple(newest_first), tracked=tracked, tracker_problem=problem)
    # Later ones are of a run that was rolled back.
    best_first = sorted(newest_first, key=lambda entry: entry[0] > tracked)
    return _Plan(candidates=tuple(best_first), tracked=tracked, tracker_problem=None)


def _nothing_there(root: Path) -> str:
    if (root / MANIFEST_NAME).exists():
        return (
            f"{root} is a checkpoint itself; give --load the directory above it, and --ckpt-step "
            "to choose among several"
        )
    return (
        f"no checkpoint in {root}: it has no directory iter_NNNNNNN; give --load the --save "
        "directory of an earlier run"
    )


def _examine(
    path: Path, iteration: int, group: dist.ProcessGroup | None, *, compare_contents: bool
) -> list[str]:
    """List the problems of a candidate: rank 0 checks names and sizes, all ranks share contents.

    Raises:
        CheckpointError: a rank does not see what rank 0 sees. To skip the candidate would lose its
            steps for a view that is only out of date.
    """
    problems, manifest = on_rank0(
        f"examining {path}", partial(_examine_outside, path, iteration), group
    )
    if manifest is None or not compare_contents:
        return problems
    share = sorted(manifest.files)[rank_of(group) :: size_of(group)]

    def compare() -> list[str]:
        if rank_of(group) > 0:
            require_visible(path, share)
        return compare_files(path, manifest, share)

    own = on_all_ranks(f"reading {path}", compare, group)
    return [problem for each in gather(own, group) for problem in each]


def _examine_outside(path: Path, iteration: int) -> tuple[list[str], Manifest | None]:
    """Return the problems of a candidate or, where there are none, its manifest."""
    if problems := verify_manifest(path, checksums=False):
        return problems, None
    manifest = read_manifest(path)
    if manifest.iteration != iteration:
        return [f"{MANIFEST_NAME} says iteration {manifest.iteration}"], None
    return [], manifest


def _report(found: FoundCheckpoint, plan: _Plan) -> None:
    """Warn if this is not the checkpoint that the tracker names."""
    if plan.tracker_problem is not None:
        logger.warning(
            "%s; taking the newest valid checkpoint, iteration %d",
            plan.tracker_problem,
            found.iteration,
        )
    for path, problems in found.skipped:
        logger.warning("skipped %s: %s", path, _shorten(problems))
    if found.skipped:
        logger.warning(
            "continuing from iteration %d, not %s: the steps between are lost",
            found.iteration,
            found.skipped[0][0].name if plan.tracked is None else plan.tracked,
        )


def _shorten(problems: tuple[str, ...]) -> str:
    more = len(problems) - _SHOWN_PROBLEMS
    return ", ".join(problems[:_SHOWN_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
