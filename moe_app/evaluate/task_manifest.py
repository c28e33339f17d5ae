"""Keeps the list of fetched files, with a hash of each, in the directory of task data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.hashing import file_sha256

MANIFEST_NAME = "manifest.json"


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each file, by its path in `root`; nothing without a manifest.

    Raises:
        DataError: `root` is no directory, or the manifest is damaged.
    """
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise DataError(f"--task-data {root} is no directory; name the one that was fetched")
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text("utf-8"))["files"]
        return {str(name): {**each, "sha256": str(each["sha256"])} for name, each in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no manifest of fetched tasks: {error!r}; fetch again into another directory"
        ) from error


def hashes_of(root: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its path in `root`.

    Raises:
        DataError: as for `read_manifest`.
    """
    return {name: each["sha256"] for name, each in read_manifest(root).items()}


def add_files(root: Path, files: Sequence[Path], facts: Mapping[str, Any]) -> None:
    """Add files to the manifest, with their sizes and hashes and the same facts of each.

    Raises:
        DataError: as for `read_manifest`, or it cannot be written.
    """
    known = read_manifest(root)
    for file in files:
        entry = {"sha256": file_sha256(file), "bytes": file.stat().st_size, **facts}
        known[file.relative_to(root).as_posix()] = entry
    text = json.dumps({"files": dict(sorted(known.items()))}, indent=1) + "\n"
    try:
        write_text(root / MANIFEST_NAME, text, durable=True)
    except OSError as error:
        raise DataError(
            f"{root / MANIFEST_NAME} cannot be written: {error.strerror or error}; hashes are kept"
            " there; free some space, or name another --output"
        ) from error


def check_file(root: Path, hashes: Mapping[str, str], file: Path) -> None:
    """Refuse a file that is not one of those that were fetched; without a manifest, none is.

    Raises:
        DataError: the manifest does not have it, or another hash of it.
    """
    known = hashes.get(file.relative_to(root).as_posix())
    if known is None and (root / MANIFEST_NAME).is_file():
        raise DataError(
            f"{file} is not in {root / MANIFEST_NAME}, which names every file that was fetched;"
            " take the file away or, if it belongs there, fetch its task again; files that you make"
            " yourself go into another directory, without a manifest"
        )
    if known is not None and file_sha256(file) != known:
        raise DataError(
            f"{file} is not the file that {root / MANIFEST_NAME} names; its SHA-256 differs;"
            " fetch it again"
        )
