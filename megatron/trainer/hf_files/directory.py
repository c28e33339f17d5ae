"""Reads a Hugging Face checkpoint directory: the config, and any rows of any tensor.

Tensors are read with `safetensors.safe_open`. What it does not do is done here, before it:

* Only plain names of the directory itself are opened, whatever an index says. The entry of such a
  name may be a symbolic link, for that is what a Hub snapshot is made of; a path from a file is
  never followed. A pipe is refused, not waited for.
* The header is checked by `header.read_header`: errors name the tensor, the rule and the remedy, a
  name that comes twice is refused (safetensors takes the last), and so is a type that no weight
  has. It also says where a tensor's bytes are, which checksums need and `safe_open` does not tell.
* A file that has become shorter is noticed before its pages are touched: beyond the end of a mapped
  file the kernel ends the process (SIGBUS). Between that look and the copy the risk remains, and
  with it that of a disk that fails; no output is published then.
* Pages that were read stay mapped, and count as the process's, until the file is opened again; that
  is done every `MAPPED_BYTES`, so that a file of any size takes bounded memory.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files.header import TensorEntry, read_header
from megatron.trainer.hf_files.plan import INDEX_NAME, SINGLE_NAME
from megatron.trainer.io.bounded_read import is_plain_name, open_regular, read_at_most

CONFIG_NAME = "config.json"

MOST_BYTES = 1 << 27
"""Of any file but the weights: an index of a million tensors has about this size."""

MAPPED_BYTES = 1 << 29
"""What is read of a file before it is opened again."""

_AGAIN = "download it again"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Region:
    """Describes a byte range of an open file."""

    descriptor: int
    begin: int
    num_bytes: int


class HFDirectory:
    """Opens a checkpoint directory and validates its safetensors headers.

    Use it in a `with` statement: it keeps its files open.

    Args:
        path: the directory, downloaded or written by `save_pretrained`.

    Raises:
        CheckpointError: it is not one, or a file in it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a directory; give the directory of a Hugging Face checkpoint, and"
                " download one from the Hub with `hf download NAME --local-dir DIR` first"
            )
        self.path = path
        self.config = read_json(path, CONFIG_NAME)
        """Contents of config.json."""
        self.files: dict[str, int] = {}
        """Open descriptors of the safetensors files, by name."""
        self._places: dict[str, tuple[_MappedFile, TensorEntry]] = {}
        with contextlib.ExitStack() as stack:
            for name, wanted in _weight_files(path).items():
                self._add(name, wanted, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> "HFDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Return all tensors by name."""
        return {name: entry for name, (_, entry) in self._places.items()}

    def leave_out(self, name: str) -> None:
        """Forget a tensor, which is then none of the checkpoint's."""
        del self._places[name]

    def region(self, name: str) -> Region:
        """Return the byte range of a tensor."""
        file, entry = self._places[name]
        return Region(descriptor=file.descriptor, begin=entry.begin, num_bytes=entry.num_bytes)

    def read(self, name: str, *, start: int, count: int) -> torch.Tensor:
        """Read rows `start` to `start + count` of a tensor of at least one axis.

        Returns:
            [count, ...] of the type on disk; maps the file, so it must not be changed in place.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        file, entry = self._places[name]
        row_bytes = entry.num_bytes // entry.shape[0] if entry.shape[0] else 0
        end = entry.begin + (start + count) * row_bytes
        return file.read(name, start, count, end=end, num_bytes=count * row_bytes)

    def _add(self, name: str, wanted: set[str] | None, stack: contextlib.ExitStack) -> None:
        """Open one safetensors file; `wanted` are the tensors that an index says it holds."""
        file = stack.enter_context(open_entry(self.path, name))
        entries = read_header(file, str(self.path / name))
        if wanted is not None and wanted != entries.keys():
            missing, extra = sorted(wanted - entries.keys()), sorted(entries.keys() - wanted)
            found = [f"lacks {_listed(missing)}"] if missing else []
            found += [f"holds {_listed(extra)} besides"] if extra else []
            raise CheckpointError(
                f"{self.path / name} {' and '.join(found)}, against what {INDEX_NAME} says; files"
                " of two checkpoints are mixed, or it is damaged; download it again"
            )
        self.files[name] = file.fileno()
        mapped = _MappedFile(file.fileno(), str(self.path / name))
        stack.callback(mapped.close)
        for tensor, entry in entries.items():
            self._places[tensor] = (mapped, entry)


class _MappedFile:
    """Reads slices of the tensors of one safetensors file.

    Args:
        descriptor: of the file, whose header was checked; stays open.
        name: how errors call it.

    Raises:
        CheckpointError: safetensors refuses it.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self._name = descriptor, name
        self._unmapped = MAPPED_BYTES
        self._file: Any = self._open()

    def close(self) -> None:
        """Unmap the file, once the tensors read from it are freed."""
        self._file = None

    def read(
        self, tensor: str, start: int, count: int, *, end: int, num_bytes: int
    ) -> torch.Tensor:
        """Map rows of a tensor; `end` is where they end in the file.

        Raises:
            CheckpointError: the file ends before, or safetensors refuses the slice.
        """
        size = os.fstat(self.descriptor).st_size
        if size < end:
            raise CheckpointError(
                f"tensor {tensor}: the file ends {end - size} bytes too early; it was changed while"
                " it was read, start again with a complete one"
            )
        if self._unmapped < num_bytes:
            self._file, self._unmapped = self._open(), MAPPED_BYTES
        self._unmapped -= num_bytes
        try:
            rows: torch.Tensor = self._file.get_slice(tensor)[start : start + count]
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{self._name} cannot be read: {error}; {_AGAIN}") from error
        return rows

    def _open(self) -> Any:
        try:
            # The file that was checked, whatever has its name by now.
            return safetensors.safe_open(f"/dev/fd/{self.descriptor}", framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self._name} cannot be read: {error}; {_AGAIN}") from error


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of the directory.

    Raises:
        CheckpointError: it is missing, too large, or something else.
    """
    try:
        content = json.loads(read_entry(directory, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{directory / name} is not JSON: {error}; download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{directory / name} holds a {type(content).__name__}, not a JSON object; download it"
            " again"
        )
    return content


def read_entry(directory: Path, name: str) -> bytes:
    """Read a file of the directory.

    Raises:
        CheckpointError: it is missing, no regular file, or larger than `MOST_BYTES`.
    """
    with open_entry(directory, name) as file:
        try:
            return read_at_most(file, MOST_BYTES)
        except OSError as error:
            raise CheckpointError(
                f"{directory / name} cannot be read: {error.strerror}; download it again"
            ) from error


@contextlib.contextmanager
def open_entry(directory: Path, name: str) -> Iterator[Any]:
    """Open a regular file of the directory, or a link to one, without waiting for a writer.

    Raises:
        CheckpointError: it is not there, or no regular file.
    """
    path = directory / name
    try:
        descriptor = open_regular(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise CheckpointError(
                f"{path} is not a regular file; put the file itself there"
            ) from error
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory; give one that holds {name}"
            ) from error
        there = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20])
        raise CheckpointError(
            f"cannot open {path}: {error.strerror}; the directory holds {there or 'nothing'}"
        ) from error
    with open(descriptor, "rb", buffering=0) as file:
        yield file


def _weight_files(path: Path) -> dict[str, set[str] | None]:
    """List the safetensors files, each with its tensors by the index (None without an index)."""
    # A link that leads nowhere counts as there, so that opening it says so.
    is_single, is_sharded = (os.path.lexists(path / name) for name in (SINGLE_NAME, INDEX_NAME))
    if is_single and is_sharded:
        raise CheckpointError(
            f"{path} holds both {SINGLE_NAME} and {INDEX_NAME}; which of them are the weights is"
            " not known; remove the other one"
        )
    if is_single:
        return {SINGLE_NAME: None}
    if is_sharded:
        return dict(_read_index(path))
    there = sorted(entry.name for entry in path.iterdir())
    pickled = [name for name in there if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        raise CheckpointError(
            f"{path} holds its weights as {pickled[0]}, a pickle, which can execute code; only"
            " safetensors are read; where you trust it, load it with transformers and write it with"
            " save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(
        f"{path} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}; it holds"
        f" {', '.join(there[:20])}"
    )


def _read_index(path: Path) -> dict[str, set[str]]:
    """Read the index: file names, and the tensors in each."""
    weight_map = read_json(path, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path / INDEX_NAME} lacks `weight_map`, the file of each tensor; download it again"
        )
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not is_plain_name(name)
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path / INDEX_NAME} says that tensor {tensor} is in {name!r}; it must be the"
                " plain name of a .safetensors file in the same directory"
            )
        files.setdefault(name, set()).add(tensor)
    missing = [name for name in sorted(files) if not os.path.lexists(path / name)]
    if missing:
        raise CheckpointError(
            f"{path / INDEX_NAME} names {_listed(missing)}, which the directory does not hold;"
            " download the rest"
        )
    return files


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
