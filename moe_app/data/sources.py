"""Finds the files to read: named ones, those of a folder or pattern, and datasets on disk."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.bounded_read import is_plain_name, read_small

Kind = Literal["jsonl", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
CACHE_SUFFIX = ".chat-cache"
"""Ends the names of folders in which tokens are kept, beside what they were made of."""
_PACKED = (".gz", ".zst")
_MOST_STATE_BYTES = 1 << 26


@dataclass(frozen=True)
class SourceFile:
    """Names one file to read and the name of what is made of it."""

    path: str
    kind: Kind
    name: str
    """Unique; outputs are NAME.jsonl."""
    size: int
    modified_ns: int
    """Like the size, to notice a file that changed between two starts."""


def refuse_inside(folder: Path, inputs: Sequence[str], *, output: str) -> None:
    """Refuse to write into a folder whose files are read: what is written would be input next time.

    Args:
        folder: Where files are to be written.
        inputs: What is read.
        output: The flag that names the folder, with its value, for the message.

    Raises:
        ConfigError: The folder is one of the inputs, or in one.
    """
    for each in inputs:
        if os.path.isdir(each) and folder.resolve().is_relative_to(Path(each).resolve()):
            raise ConfigError(
                f"{output} is in --input {each}, whose files are read; the output must be outside;"
                " choose another folder"
            )


def find_sources(inputs: Sequence[str], *, flag: str = "--input") -> list[SourceFile]:
    """Return the files that inputs name, in the order of the inputs and then of their names.

    Args:
        inputs: Files; folders, all of whose files with a known suffix are taken, in subfolders
            too, but not from caches of tokens; patterns such as `data/*.jsonl.zst`; directories of
            `Dataset.save_to_disk`.
        flag: What names the inputs, for messages.

    Raises:
        DataError: An input is not a local path, leads nowhere or out of its folder, or is there
            twice.
    """
    found: list[tuple[Path, Kind]] = []
    for each in inputs:
        if "://" in each or "::" in each:
            raise DataError(
                f"{flag} {each} is no local path; files must be on this machine or on a file"
                " system that it mounts; fetch them first"
            )
        files = _expand(each, flag)
        if not files:
            raise DataError(
                f"{flag} {each}: no file to read; it must name JSON Lines"
                f" ({', '.join(_KINDS)}, {' or '.join(_PACKED)} after it), Parquet, a folder of"
                " them, or a dataset on disk; check the path"
            )
        found += files
    seen: dict[str, Path] = {}
    for path, _ in found:
        if (real := os.path.realpath(path)) in seen:
            raise DataError(
                f"{flag} names {path} twice, also as {seen[real]}; each file must be there once;"
                " remove one"
            )
        seen[real] = path
    names = [_stem(path) for path, _ in found]
    if len(set(names)) < len(names):
        names = [f"{index:05d}-{name}" for index, name in enumerate(names)]
    return [_describe(path, kind, name) for (path, kind), name in zip(found, names, strict=True)]


def _describe(path: Path, kind: Kind, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(os.path.abspath(path), kind, name, status.st_size, status.st_mtime_ns)


def _expand(text: str, flag: str) -> list[tuple[Path, Kind]]:
    path = Path(text)
    if path.is_file():
        return [(path, _kind(path) or "jsonl")]
    if path.is_dir():
        return list(_files_of(path, path))
    if glob.has_magic(text):
        root = Path(*_before_magic(path))
        matches = (Path(each) for each in glob.glob(text, recursive=True))
        files = sorted(each for each in matches if not _is_cached(each, root))
        return [(_inside(file, root), _kind(file) or "jsonl") for file in files if file.is_file()]
    raise DataError(
        f"{flag} {text} does not exist or is no regular file; it must be a file, a folder or a"
        " pattern; check the path"
    )


def _files_of(folder: Path, root: Path) -> Iterator[tuple[Path, Kind]]:
    """Yield the files of a folder, in the order of their names; a dataset on disk as a whole."""
    if _is_dataset(folder):
        yield from ((file, "arrow") for file in _dataset_files(folder))
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            # A cache may be written, and renamed, while others look.
            if not entry.is_symlink() and not entry.name.endswith(CACHE_SUFFIX):
                yield from _files_of(entry, root)
        elif kind := _kind(entry):
            yield _inside(entry, root), kind


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _is_cached(path: Path, root: Path) -> bool:
    """Return whether a file that a pattern found is in a cache of tokens below its root."""
    return any(part.endswith(CACHE_SUFFIX) for part in path.parts[len(root.parts) : -1])


def _before_magic(path: Path) -> list[str]:
    parts = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _kind(path: Path) -> Kind | None:
    name = path.name
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return _KINDS.get(Path(name).suffix)


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (*_PACKED, *_KINDS, ".arrow"):
        name = name.removesuffix(suffix)
    return name or "input"


def _inside(path: Path, folder: Path) -> Path:
    """Return a file found in a folder, unless a link leads out of it.

    The blobs of a Hugging Face Hub cache, to which its snapshots link, do not count as outside.
    """
    real, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
    for parent in [*roots, *roots[0].parents]:
        if parent.parent.name == "snapshots":
            roots.append(parent.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise DataError(
            f"{path} is a link to {real}, out of {folder}; what is found in a folder must lie in"
            " it; name the file itself if it is meant"
        )
    return path


def _dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a dataset or of all splits of one.

    Raises:
        DataError: Its description is not as `save_to_disk` writes it.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _read_state(splits).get("splits")
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise _not_a_dataset(splits)
        return [file for name in names for file in _dataset_files(folder / name)]
    state = folder / "state.json"
    values = _read_state(state)
    files = values.get("_data_files")
    if values.get("_indices_data_files") or not isinstance(files, list):
        raise _not_a_dataset(state)
    names = [each.get("filename") if isinstance(each, dict) else None for each in files]
    if not all(map(_is_name, names)):
        raise _not_a_dataset(state)
    return [_inside(folder / str(name), folder) for name in names]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and is_plain_name(value)


def _read_state(path: Path) -> dict[str, object]:
    try:
        value = json.loads(read_small(path, most_bytes=_MOST_STATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise _not_a_dataset(path) from error
    if not isinstance(value, dict):
        raise _not_a_dataset(path)
    return value


def _not_a_dataset(path: Path) -> DataError:
    return DataError(
        f"{path} does not describe a dataset as Dataset.save_to_disk writes it, without indices;"
        " save it again, after flatten_indices()"
    )
