"""Names in a run directory, as Megatron-LM lays them out, and moves that a crash cannot tear.

A checkpoint lives under one of three names:

* `iter_0000100`: whole, or damaged since; nothing is ever written into it;
* `iter_0000100.tmp-<id>`: being written, or being deleted;
* `iter_0000100.replaced-<id>`: whole, set aside for a moment while a newer one takes its name.
"""

import logging
import re
import shutil
from pathlib import Path

from megatron.trainer.io.atomic_write import sync_directory, write_text
from megatron.trainer.io.bounded_read import read_small

TRACKER_NAME = "latest_checkpointed_iteration.txt"

_NAME = re.compile(r"iter_(\d{7,})(?:\.(tmp|replaced)-([0-9a-f]+))?")

logger = logging.getLogger(__name__)


def directory_name(iteration: int) -> str:
    """Name of the checkpoint of `iteration`: iter_0000100."""
    return f"iter_{iteration:07d}"


def final_path(root: Path, iteration: int) -> Path:
    """Where the checkpoint of `iteration` is found."""
    return root / directory_name(iteration)


def partial_path(root: Path, iteration: int, attempt: str) -> Path:
    """Where one attempt to save `iteration` writes."""
    return root / f"{directory_name(iteration)}.tmp-{attempt}"


def replaced_path(root: Path, iteration: int, attempt: str) -> Path:
    """Where the earlier checkpoint of `iteration` waits until its successor has its name."""
    return root / f"{directory_name(iteration)}.replaced-{attempt}"


def final_iterations(root: Path) -> list[int]:
    """Iterations with a directory of final name, ascending."""
    return sorted(iteration for iteration, kind, _ in _entries(root) if kind is None)


def stranded(root: Path) -> dict[int, Path]:
    """Checkpoints whose process died after setting them aside, before the successor moved in."""
    finals = set(final_iterations(root))
    return {
        iteration: path
        for iteration, kind, path in _entries(root)
        if kind == "replaced" and iteration not in finals
    }


def clear_leftovers(root: Path) -> None:
    """Undo what saves that died have left in `root`: unfinished directories, unfinished moves."""
    for path in stranded(root).values():
        original = root / path.name.partition(".")[0]
        path.rename(original)
        logger.warning("moved %s back to %s: a save died while replacing it", path, original.name)
    for _, kind, path in _entries(root):
        if kind is not None:
            logger.warning("removing %s: the save that wrote it did not finish", path)
            remove(path)
    for path in root.glob(f"{TRACKER_NAME}.tmp*"):
        path.unlink()
    sync_directory(root)


def publish(root: Path, iteration: int, attempt: str) -> None:
    """Give a finished attempt its final name; an earlier checkpoint of that name is set aside.

    At every moment the directory holds a whole checkpoint of that iteration, if it did before,
    under a name where `find_checkpoint` finds it.
    """
    partial, final = partial_path(root, iteration, attempt), final_path(root, iteration)
    replaced = replaced_path(root, iteration, attempt)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_directory(root)


def discard(root: Path, iteration: int, attempt: str) -> None:
    """Delete a checkpoint; a crash on the way leaves no half of it under its final name."""
    doomed = partial_path(root, iteration, attempt)
    final_path(root, iteration).rename(doomed)
    sync_directory(root)
    remove(doomed)


def remove(path: Path) -> None:
    """Delete a directory of ours, or say that it could not be."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def write_tracker(root: Path, iteration: int) -> None:
    """Let `latest_checkpointed_iteration.txt` name `iteration`; readers see the old or the new."""
    write_text(root / TRACKER_NAME, str(iteration), durable=True)


def read_tracker(root: Path) -> int | str:
    """The iteration that the tracker names, or what is wrong with the tracker."""
    path = root / TRACKER_NAME
    try:
        text = read_small(path, most_bytes=64).decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return f"{TRACKER_NAME} is missing"
    except OSError as error:
        return f"{TRACKER_NAME} cannot be read: {error.strerror}"
    if not re.fullmatch(r"[0-9]{1,18}", text):
        return f"{TRACKER_NAME} holds {text!r}, not an iteration"
    return int(text)


def _entries(root: Path) -> list[tuple[int, str | None, Path]]:
    """Iteration, kind (None: final) and path of every checkpoint directory, sorted by name."""
    entries = []
    for path in sorted(root.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            entries.append((int(match[1]), match[2], path))
    return entries
