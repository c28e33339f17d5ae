"""Names checkpoints as Megatron-LM does, and moves them so that a crash leaves a valid state.

A checkpoint lives under one of three names:

* `iter_0000100`: complete, or damaged since; nothing is ever written into it;
* `iter_0000100.tmp-<id>`: being written, or being deleted;
* `iter_0000100.replaced-<id>`: complete, set aside while a newer one takes its name.
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
    """Return the name of the checkpoint of `iteration`: iter_0000100."""
    return f"iter_{iteration:07d}"


def final_path(root: Path, iteration: int) -> Path:
    """Return the path of the checkpoint of `iteration`."""
    return root / directory_name(iteration)


def partial_path(root: Path, iteration: int, attempt: str) -> Path:
    """Return the path that one attempt to save `iteration` writes to."""
    return root / f"{directory_name(iteration)}.tmp-{attempt}"


def replaced_path(root: Path, iteration: int, attempt: str) -> Path:
    """Return the path of the earlier checkpoint of `iteration` while it is being replaced."""
    return root / f"{directory_name(iteration)}.replaced-{attempt}"


def final_iterations(root: Path) -> list[int]:
    """Return the iterations with a directory of final name, ascending."""
    return sorted(iteration for iteration, kind, _ in _entries(root) if kind is None)


def stranded(root: Path) -> dict[int, Path]:
    """Return checkpoints that were set aside and not replaced, because the process was killed."""
    finals = set(final_iterations(root))
    return {
        iteration: path
        for iteration, kind, path in _entries(root)
        if kind == "replaced" and iteration not in finals
    }


def clear_leftovers(root: Path) -> None:
    """Clean up after killed saves in `root`: remove partial directories, undo unfinished moves."""
    for path in stranded(root).values():
        original = root / path.name.partition(".")[0]
        path.rename(original)
        logger.warning(
            "moved %s back to %s: a save was killed while replacing it", path, original.name
        )
    for _, kind, path in _entries(root):
        if kind is not None:
            logger.warning("removing %s: the save that wrote it did not finish", path)
            remove(path)
    for path in root.glob(f"{TRACKER_NAME}.tmp*"):
        path.unlink()
    sync_directory(root)


def publish(root: Path, iteration: int, attempt: str) -> None:
    """Rename a finished attempt to its final name, and set an earlier checkpoint aside.

    At every moment the directory holds a complete checkpoint of that iteration, if it did before,
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
    """Delete a checkpoint; a crash leaves no part of it under its final name."""
    doomed = partial_path(root, iteration, attempt)
    final_path(root, iteration).rename(doomed)
    sync_directory(root)
    remove(doomed)


def remove(path: Path) -> None:
    """Delete a directory; log a warning if that fails."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def write_tracker(root: Path, iteration: int) -> None:
    """Write `iteration` to `latest_checkpointed_iteration.txt` atomically."""
    write_text(root / TRACKER_NAME, str(iteration), durable=True)


def read_tracker(root: Path) -> int | str:
    """Return the iteration that the tracker names, or a description of its problem."""
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
    """Return iteration, kind (None: final) and path of every checkpoint directory, by name."""
    entries = []
    for path in sorted(root.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            entries.append((int(match[1]), match[2], path))
    return entries
