"""Writes and checks the manifest of a checkpoint: every file with its size and SHA-256.

`manifest.json` is written last, so its presence says that everything before it was written; its
contents say that nothing has changed since. Hashing can be shared: each rank hashes some files.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.atomic_write import sync_directory, write_durably
from megatron.trainer.io.bounded_read import is_plain_name, read_small
from megatron.trainer.io.hashing import add_file

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_MOST_BYTES = 1 << 26
"""Of a manifest: room for half a million files."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Holds the size and digest of one file."""

    size_bytes: int
    sha256: str
    """Lower-case hexadecimal digest."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Holds the manifest of one checkpoint directory."""

    iteration: int
    files: Mapping[str, FileRecord]
    """By name, except manifest.json."""


def list_files(directory: Path) -> list[str]:
    """Return the sorted names in `directory`, except the manifest."""
    return sorted(entry.name for entry in directory.iterdir() if entry.name != MANIFEST_NAME)


def hash_files(directory: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Return size and digest of each named file, after forcing it to disk.

    Raises:
        CheckpointError: a name is not a regular file.
    """
    records = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file that this rank can see")
        with path.open("rb") as file:
            os.fsync(file.fileno())
        records[name] = _digest(path)
    return records


def write_manifest(
    directory: Path, iteration: int, records: Mapping[str, FileRecord] | None = None
) -> Path:
    """Write `manifest.json` into `directory` and force it and the directory to disk.

    Args:
        directory: a checkpoint that is otherwise complete.
        iteration: optimizer steps done.
        records: what `hash_files` gave for every file; None hashes them here.

    Raises:
        CheckpointError: `records` names other files than the directory holds.
    """
    names = list_files(directory)
    if records is None:
        records = hash_files(directory, names)
    if sorted(records) != names:
        raise CheckpointError(
            f"{directory} holds {', '.join(names)}, but {', '.join(sorted(records))} were hashed; "
            "nothing else may write there"
        )
    content = {
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "files": {
            name: {"bytes": records[name].size_bytes, "sha256": records[name].sha256}
            for name in names
        },
    }
    path = directory / MANIFEST_NAME
    write_durably(path, json.dumps(content, indent=1) + "\n")
    sync_directory(directory)
    return path


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of `directory`.

    Raises:
        CheckpointError: it is missing, damaged or of another version. The message is short and
            does not name the directory; it is one line of a list of problems.
    """
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(read_small(path, most_bytes=_MOST_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST_NAME} is missing: saving never finished") from error
    except (OSError, ValueError, RecursionError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {told}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    iteration, files = content.get("iteration"), content.get("files")
    if type(iteration) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST_NAME} lacks `iteration` or `files`")
    return Manifest(
        iteration=iteration, files={name: _record(name, entry) for name, entry in files.items()}
    )


def verify_manifest(directory: Path, *, checksums: bool) -> list[str]:
    """List what is wrong with a checkpoint, one line a problem; nothing if it is valid.

    Args:
        directory: the checkpoint.
        checksums: compare contents too, not names and sizes alone.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    try:
        present = set(list_files(directory))
    except OSError as error:
        return [f"cannot be listed: {error}"]
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - present)]
    problems += [
        f"{name} is not in the manifest" for name in sorted(present - manifest.files.keys())
    ]
    common = sorted(present & manifest.files.keys())
    for name in common:
        size, wanted = _size_bytes(directory / name), manifest.files[name].size_bytes
        if size != wanted:
            problems.append(f"{name} has {size} bytes, the manifest says {wanted}")
    if checksums and not problems:
        problems += compare_files(directory, manifest, common)
    return problems


def compare_files(directory: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """List which of the named files differ from the manifest in content, one line a problem."""
    problems = []
    for name in names:
        try:
            digest = _digest(directory / name).sha256
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if digest != manifest.files[name].sha256:
            problems.append(f"{name} has changed: its SHA-256 is not the manifest's")
    return problems


def require_visible(directory: Path, names: Sequence[str]) -> None:
    """Check that this rank sees files that rank 0 sees.

    Raises:
        CheckpointError: it does not see one.
    """
    for name in names:
        if not (directory / name).is_file():
            raise CheckpointError(
                f"host {socket.gethostname()} does not see {directory / name}, which rank 0 sees;"
                " checkpoints need one file system that all nodes share; look at the mount on that"
                " host, or start again when it has caught up"
            )


def _record(name: str, entry: Any) -> FileRecord:
    """Parse and check one entry of `files`."""
    size = entry.get("bytes") if isinstance(entry, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not is_plain_name(name) or type(size) is not int or not isinstance(digest, str):
        raise CheckpointError(f"{MANIFEST_NAME} has a bad entry for {name!r}")
    return FileRecord(size_bytes=size, sha256=digest)


def _digest(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = add_file(digest, file)
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())


def _size_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
