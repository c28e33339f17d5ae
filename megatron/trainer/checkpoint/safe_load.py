"""Reads checkpoints without executing them.

A pickle is a program. torch 2.6 to 2.14 and megatron-core 0.16 to 0.19 still run three kinds of it
when a distributed checkpoint is loaded: the `.metadata` file, every object stored inside a
`.distcp` file, and, when TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, `common.pt`. The tensors inside a
`.distcp` file are read with `weights_only`, which megatron-core weakens: when imported it declares
NumPy's arrays safe, and an array of objects follows addresses that stand in the file.
`install_guards` replaces all of these readers by ones that know what a checkpoint may hold and
refuse the rest.

`load_trusted_types` is the one call of `torch.load` for anything that this project reads.
"""

import io
import os
import pickle
import re
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from megatron.trainer.checkpoint.metadata_check import metadata_problems
from megatron.trainer.compat import guard_common_state
from megatron.trainer.errors import CheckpointError

_REMEDY = (
    "a checkpoint needs no such thing, so this one was made to run code on the machine that loads "
    "it, or is damaged; do not load checkpoints from people you do not trust"
)

_ALLOWED_GLOBALS = frozenset(
    {
        # What a checkpoint is made of: plain records without behaviour.
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        # megatron-core 0.16 keeps every rank's plan in the metadata that its own writer leaves.
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem")
        ),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        # megatron-core 0.15 wrote these two; 0.16 keeps empty classes to read them.
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        # Values inside the records.
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch", name)
            for name, value in sorted(vars(torch).items())
            if isinstance(value, torch.dtype)
        ),
    }
)


_ALLOWED_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("SHORT_BINBYTES", "BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
)


def _code_of(name: str) -> int:
    code: bytes = getattr(pickle, name)
    return code[0]


class _Opcodes(dict[int, Callable[..., None]]):
    """Maps each opcode of a pickle to its handler, and refuses all others."""

    def __missing__(self, opcode: int) -> Callable[..., None]:
        raise pickle.UnpicklingError(f"it has the opcode {opcode:#x}, which no checkpoint needs")


class _MetadataUnpickler(pickle._Unpickler):
    """Builds what the metadata of a distributed checkpoint holds, and nothing else.

    The one written in Python: it needs half as long again for real metadata, and the one written in
    C allocates as much memory as a few bytes tell it to. Keys of dicts are checked before they are
    hashed, which for nested tuples could take exponential time.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch = _Opcodes(
        {code: pickle._Unpickler.dispatch[code] for code in map(_code_of, _ALLOWED_OPCODES)}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Look up a global; raises CheckpointError for any that is not on the list."""
        if (module, name) not in _ALLOWED_GLOBALS:
            raise CheckpointError(f"it asks for `{module}.{name}`; {_REMEDY}")
        return super().find_class(module, name)

    def load_setitems(self) -> None:
        """Put keys and values into a dict."""
        self._fill(self.pop_mark())

    def load_setitem(self) -> None:
        """Put one key and its value into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key in items[::2]:
            if not _is_plain_key(key):
                raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key")
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"it puts keys into a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem


def _is_plain_key(key: Any) -> bool:
    """Return whether this is cheap to hash: a string, a number, or a tuple of these."""
    if isinstance(key, MetadataIndex):
        return isinstance(key.fqn, str) and _is_plain_key(key.offset)
    if isinstance(key, tuple):
        return all(isinstance(item, str | int | None) for item in key)
    return isinstance(key, str | int | None)


class _GuardedPickle(types.ModuleType):
    """Replaces the pickle module in `torch.distributed.checkpoint.filesystem`; guards `load`."""

    def __getattr__(self, name: str) -> Any:
        if name in {"dump", "dumps"}:
            return getattr(pickle, name)
        raise AttributeError(f"only dump, dumps and a guarded load are offered, not {name}")

    @staticmethod
    def load(file: IO[bytes]) -> Metadata:
        """Read `.metadata`; see `load_metadata`."""
        return load_metadata(file)


class _GuardedTorch(types.ModuleType):
    """Replaces the torch module in `torch.distributed.checkpoint.filesystem`; guards `load`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(file: IO[bytes], *, map_location: str, weights_only: bool) -> Any:
        """Read a tensor; see `load_trusted_types`. Torch's reader gives all of these arguments."""
        del map_location, weights_only  # "cpu", True
        shard = getattr(getattr(file, "base_stream", file), "name", "a shard")
        return load_trusted_types(file, name=f"a tensor in {shard}")


def load_metadata(file: IO[bytes]) -> Metadata:
    """Read the `.metadata` of a distributed checkpoint without executing it.

    Args:
        file: the open file; its `name`, where it has one, appears in errors.

    Raises:
        CheckpointError: it asks for a global that metadata has no use for, is no metadata, points
            outside its directory, or contradicts itself.
    """
    name = getattr(file, "name", ".metadata")
    try:
        metadata = _MetadataUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"refused to load {name}: {error}") from error
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise CheckpointError(
            f"cannot read {name}: {_first_line(error)}; the file is damaged, take another "
            "checkpoint"
        ) from error
    try:
        problem = next(metadata_problems(metadata), None)
    except AttributeError as error:
        problem = f"it holds a record without all of its fields ({_first_line(error)})"
    if problem is not None:
        raise CheckpointError(
            f"refused to load {name}: {problem}; the file is damaged or made up, take another"
            " checkpoint"
        )
    return metadata


def load_trusted_types(file: str | Path | IO[bytes], *, name: str) -> Any:
    """Call `torch.load` to the CPU, for tensors, containers, numbers and strings only.

    `weights_only=True` is passed explicitly: torch then disregards the environment variable
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which silently replaces the default. What other packages have
    declared safe, for this process, is forgotten.

    Args:
        file: path or open file, which may be read from any position.
        name: how errors call it.

    Raises:
        FileNotFoundError: `file` does not exist.
        CheckpointError: it asks for any other global, is not as torch.save writes files, or is
            damaged.
    """
    torch.serialization.clear_safe_globals()
    try:
        _require_plain_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"refused to load {name}: {refusal(error)}") from error
    except Exception as error:  # torch raises nearly anything of a damaged file
        raise CheckpointError(
            f"cannot read {name}: {_first_line(error)}; the file is damaged, take another "
            "checkpoint"
        ) from error


def _require_plain_archive(file: str | Path | IO[bytes]) -> None:
    """Refuse what torch.save does not write: older formats, and entries that unpack to more.

    Raises:
        zipfile.BadZipFile: it is one of these.
    """
    start = None if isinstance(file, str | Path) else file.tell()
    with zipfile.ZipFile(file if isinstance(file, str | Path) else _Rewindable(file)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise zipfile.BadZipFile(f"{entry.filename[:80]!r} in it is compressed")
    if start is not None:
        file.seek(start)  # type: ignore[union-attr]  # not a path


class _Rewindable(io.RawIOBase):
    """Wraps a file for zipfile, which seeks from the end; torch's view of a part cannot."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0, os.SEEK_END)
        self._size = file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}
        target = bases[whence] + offset
        if not 0 <= target <= self._size:
            raise OSError(f"byte {target} of {self._size} is asked for")
        self._file.seek(target)
        return target

    def read(self, size: int = -1, /) -> bytes:
        room = self._size - self._file.tell()
        return self._file.read(room if size < 0 else min(size, room))


def refusal(error: pickle.UnpicklingError) -> str:
    """Explain why torch refused to load a file, with a remedy."""
    return f"{what_it_holds(error)}; {_REMEDY}"


def what_it_holds(error: pickle.UnpicklingError) -> str:
    """Return the offending global from torch's message, without its advice to load it anyway."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for `{found[1]}`" if found else "it is not made of plain values alone"


def install_guards() -> None:
    """Make torch's and megatron-core's checkpoint readers refuse to execute anything.

    Lasts for the process; calling it again changes nothing. Each replacement serves torch 2.6 to
    2.14 and megatron-core 0.16 and 0.19; `test_safe_load.py` fails when a release moves them.
    """
    from megatron.core.msc_utils import MultiStorageClientFeature

    # FileSystemReader.read_metadata, also under megatron-core's CachedMetadataFileSystemReader,
    # calls pickle.load on `.metadata`.
    if not isinstance(filesystem.pickle, _GuardedPickle):
        filesystem.pickle = _GuardedPickle("pickle")
    # FileSystemReader.read_data reads every tensor with what is declared safe at that moment.
    if not isinstance(filesystem.torch, _GuardedTorch):
        filesystem.torch = _GuardedTorch("torch")
    # DefaultLoadPlanner.load_bytes, inherited by MCoreLoadPlanner, reads every ShardedObject with
    # weights_only=False; so it does `common_state`, where megatron-core 0.19 itself would keep the
    # unsharded state.
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    # Both call torch.load without weights_only, which an environment variable can turn off.
    guard_common_state(_load_common, _refuse_sharded_objects)
    # The package multistorageclient, where installed, brings readers of its own for all three.
    MultiStorageClientFeature.disable()


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Replaces `DefaultLoadPlanner.load_bytes`."""
    key = read_item.dest_index.fqn
    loaded = load_trusted_types(value, name=f"object {key}")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def _load_common(checkpoint_dir: str | Path) -> Any:
    """Replaces megatron-core's reader of `common.pt`."""
    path = Path(checkpoint_dir) / "common.pt"
    try:
        return load_trusted_types(path, name=str(path))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; the checkpoint is incomplete, take another"
        ) from error


def _refuse_sharded_objects(checkpoint_dir: str | Path) -> None:
    """Replaces `TorchCommonLoadStrategy.load_sharded_objects`; torch_dist never calls it."""
    raise CheckpointError(
        f"{checkpoint_dir} keeps its objects in files of their own, as formats before torch_dist "
        "did; only torch_dist checkpoints can be loaded"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
