"""Reading checkpoints without executing them.

A pickle is a program. torch 2.6 to 2.13 and megatron-core 0.16 and 0.17 still run three kinds of it
when a distributed checkpoint is loaded: the `.metadata` file, every object stored inside a
`.distcp` file, and, when TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, `common.pt`. `install_guards`
replaces those readers by ones that know what a checkpoint may hold and refuse the rest.

`load_trusted_types` is the one call of `torch.load` for anything else this project reads.
"""

import io
import pickle
import re
import types
import zipfile
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

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


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what the metadata of a distributed checkpoint holds, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a global; raises CheckpointError for any that is not on the list."""
        if (module, name) not in _ALLOWED_GLOBALS:
            raise CheckpointError(f"it asks for `{module}.{name}`; {_REMEDY}")
        return super().find_class(module, name)


class _GuardedPickle(types.ModuleType):
    """The pickle module as `torch.distributed.checkpoint.filesystem` sees it: `load` is guarded."""

    def __getattr__(self, name: str) -> Any:
        if name in {"dump", "dumps"}:
            return getattr(pickle, name)
        raise AttributeError(f"only dump, dumps and a guarded load are offered, not {name}")

    @staticmethod
    def load(file: IO[bytes]) -> Metadata:
        """Read `.metadata`; see `load_metadata`."""
        return load_metadata(file)


def load_metadata(file: IO[bytes]) -> Metadata:
    """Read the `.metadata` of a distributed checkpoint without executing it.

    Args:
        file: the open file; its `name`, where it has one, appears in errors.

    Raises:
        CheckpointError: it asks for a global that metadata has no use for, is no metadata, or
            points outside its directory.
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
    # Not isinstance: megatron-core 0.15 wrote a class of its own here.
    if not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise CheckpointError(
            f"refused to load {name}: it holds a {type(metadata).__name__}, not the metadata of a "
            "distributed checkpoint"
        )
    _check_paths(metadata, name)
    return metadata


def load_trusted_types(file: str | Path | IO[bytes], *, name: str) -> Any:
    """`torch.load` to the CPU, for tensors, containers, numbers, strings and NumPy arrays only.

    `weights_only=True` is passed explicitly: torch then disregards the environment variable
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which silently replaces the default.

    Args:
        file: path or open file.
        name: how errors call it.

    Raises:
        FileNotFoundError: `file` does not exist.
        CheckpointError: it asks for any other global, or is damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"refused to load {name}: {refusal(error)}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"cannot read {name}: {_first_line(error)}; the file is damaged, take another "
            "checkpoint"
        ) from error


def refusal(error: pickle.UnpicklingError) -> str:
    """Why a file that torch refused to load is refused."""
    return f"{what_it_holds(error)}; {_REMEDY}"


def what_it_holds(error: pickle.UnpicklingError) -> str:
    """The offending global out of torch's page of advice on how to load it all the same."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for `{found[1]}`" if found else "it is not made of plain values alone"


def install_guards() -> None:
    """Make torch's and megatron-core's checkpoint readers refuse to execute anything.

    Lasts for the process; calling it again changes nothing. Each replacement serves torch 2.6 to
    2.13 and megatron-core 0.16; `tests/unit/test_safe_load.py` fails when a release moves them.
    """
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from megatron.core.msc_utils import MultiStorageClientFeature

    # FileSystemReader.read_metadata, also under megatron-core's CachedMetadataFileSystemReader,
    # calls pickle.load on `.metadata`.
    if not isinstance(filesystem.pickle, _GuardedPickle):
        filesystem.pickle = _GuardedPickle("pickle")
    # DefaultLoadPlanner.load_bytes, inherited by MCoreLoadPlanner, reads every ShardedObject with
    # weights_only=False.
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    # Both methods call torch.load without weights_only, which an environment variable can turn off.
    TorchCommonLoadStrategy.load_common = _load_common
    TorchCommonLoadStrategy.load_sharded_objects = _load_sharded_objects
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


def _load_common(_self: object, checkpoint_dir: str | Path) -> Any:
    """Replaces `TorchCommonLoadStrategy.load_common`."""
    path = Path(checkpoint_dir) / "common.pt"
    try:
        return load_trusted_types(path, name=str(path))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; the checkpoint is incomplete, take another"
        ) from error


def _load_sharded_objects(_self: object, _state: object, checkpoint_dir: str | Path) -> None:
    """Replaces `TorchCommonLoadStrategy.load_sharded_objects`; torch_dist never calls it."""
    raise CheckpointError(
        f"{checkpoint_dir} keeps its objects in files of their own, as formats before torch_dist "
        "did; only torch_dist checkpoints can be loaded"
    )


def _check_paths(metadata: Metadata, name: str) -> None:
    """Refuse shard files that are not plain names in the checkpoint's own directory."""
    stored = metadata.storage_data
    for info in stored.values() if isinstance(stored, dict) else ():
        shard = getattr(info, "relative_path", None)
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise CheckpointError(
                f"refused to load {name}: it points to the file {shard!r}; a checkpoint's files "
                "lie in its own directory"
            )


def is_plain_name(name: str) -> bool:
    """Whether `name` names an entry of a directory and cannot lead out of it."""
    return name not in {"", ".", ".."} and PurePath(name).name == name and "\0" not in name


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
