"""Writes a checkpoint, so that a crash at any moment loses no more than the save it interrupts.

All of it is written to a directory of a temporary name, forced to disk and described by a manifest;
then one rename makes it a checkpoint, and an atomic replacement makes the tracker name it. Every
step ends with an agreement of all ranks, so that a full disk on one stops the others too.

The state goes through megatron-core's planning (same files, same `.metadata`, any reader of
`torch_dist` loads it) but through torch's own synchronous writer: megatron-core's forks a process
for every file or keeps one beside each rank, which outlives a killed rank. `background` runs it in
a thread, on a copy of the state.
"""

import contextlib
import io
import logging
import pickle
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megatron.trainer.checkpoint import layout
from megatron.trainer.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    hash_files,
    list_files,
    verify_manifest,
    write_manifest,
)
from megatron.trainer.checkpoint.safe_load import load_trusted_types, what_it_holds
from megatron.trainer.checkpoint.stages import (
    on_all_ranks,
    on_rank0,
    torch_errors_explained,
    write_errors_kept,
)
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.io.atomic_write import sync_directory, write_durably
from megatron.trainer.io.bounded_read import is_plain_name
from megatron.trainer.runtime.collective import broadcast, gather, rank_of

ShardedStateDict = dict[str, Any]
"""megatron-core's: nested dicts and lists with ShardedTensor, ShardedObject or plain leaves."""

_RESERVED_NAMES = {MANIFEST_NAME, ".metadata", "common.pt", "metadata.json"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StagedCheckpoint:
    """Holds what this rank has to write of a state, checked by all ranks together."""

    shards: Mapping[str, Any]
    """This rank's main replicas, in the form of torch's planner."""
    common: bytes
    """The unsharded state, serialized; empty but on rank 0, which writes it."""
    files: Mapping[str, str | bytes | Path]
    """Small files to keep beside the state."""


def save_checkpoint(
    root: Path,
    iteration: int,
    state: ShardedStateDict,
    *,
    files: Mapping[str, str | bytes | Path] | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save `state` as `root/iter_NNNNNNN` and let the tracker name it.

    Called by every rank. An earlier checkpoint of the same iteration is replaced, after the new one
    is complete. On failure the directory holds the checkpoints it held before.

    Args:
        root: the run directory; must be on a file system that all ranks share.
        iteration: optimizer steps done.
        state: this rank's sharded state dict; its factories are expanded in place. Plain leaves are
            taken from rank 0. They and the data of ShardedObjects must be tensors, numbers,
            strings or containers of these, or they could not be loaded back.
        files: small files to keep beside the state, by name: content, or the path of a file to
            copy. Only rank 0's are used.
        keep_last: checkpoints to keep, this one included; older ones are deleted, later ones
            (of a run that was rolled back) never. None keeps all.
        keep_every: iterations whose multiples are kept beside those; None keeps no others.
        group: all ranks; None is the default group.

    Returns:
        The checkpoint's directory.

    Raises:
        ConfigError: `keep_last` or `keep_every` is less than 1.
        CheckpointError: saving failed on some rank; raised on all.
    """
    check_retention(keep_last, keep_every)
    with saving(root, iteration):
        staged = stage_checkpoint(state, files=files, group=group)
        return write_checkpoint(
            root, iteration, staged, keep_last=keep_last, keep_every=keep_every, group=group
        )


def check_retention(keep_last: int | None, keep_every: int | None) -> None:
    """Refuse numbers that keep nothing.

    Raises:
        ConfigError: `keep_last` or `keep_every` is less than 1.
    """
    if keep_last is not None and keep_last < 1:
        raise ConfigError(
            f"keep_last ({keep_last}) must be at least 1, the checkpoint just written; leave it "
            "out to keep all"
        )
    if keep_every is not None and keep_every < 1:
        raise ConfigError(
            f"keep_every ({keep_every}) must be at least 1; leave it out to keep no others"
        )


@contextlib.contextmanager
def saving(root: Path, iteration: int) -> Iterator[None]:
    """Say of a CheckpointError in the context which save failed, and what it leaves."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"could not save iteration {iteration} to {root}: {error}; the checkpoints that were "
            "there before are untouched"
        ) from error


def stage_checkpoint(
    state: ShardedStateDict,
    *,
    files: Mapping[str, str | bytes | Path] | None = None,
    is_copied: bool = False,
    group: dist.ProcessGroup | None = None,
) -> StagedCheckpoint:
    """Check a state on all ranks, and select what this rank writes of it.

    Args:
        state: as in `save_checkpoint`.
        files: as in `save_checkpoint`.
        is_copied: copy the tensors to host memory, so that training may go on meanwhile.
        group: all ranks; None is the default group.

    Raises:
        CheckpointError: the state is invalid on some rank; raised on all.
    """
    # Its collectives come first and its checks, on rank 0, last: no rank is left behind.
    sharded, common = on_all_ranks("checking the state", partial(save_preprocess, state), group)
    to_torch = partial(_to_torch, sharded, is_copied=is_copied)
    shards = on_all_ranks("preparing the shards", to_torch, group)
    is_first = rank_of(group) == 0
    plain = on_all_ranks(
        "preparing the unsharded state", lambda: _serialize(common) if is_first else b"", group
    )
    return StagedCheckpoint(shards=shards, common=plain, files=dict(files or {}))


def write_checkpoint(
    root: Path,
    iteration: int,
    staged: StagedCheckpoint,
    *,
    keep_last: int | None,
    keep_every: int | None,
    group: dist.ProcessGroup | None,
) -> Path:
    """Write a staged checkpoint, publish it and delete old ones; arguments as `save_checkpoint`'s.

    Raises:
        CheckpointError: it failed on some rank; raised on all.
    """
    attempt = broadcast(secrets.token_hex(4), group)
    try:
        _write(layout.partial_path(root, iteration, attempt), iteration, staged, group)
        publish = partial(layout.publish, root, iteration, attempt)
        on_rank0("renaming the finished checkpoint", publish, group)
    except CheckpointError:
        if rank_of(group) == 0 and layout.partial_path(root, iteration, attempt).exists():
            layout.remove(layout.partial_path(root, iteration, attempt))
        raise
    # From here on the checkpoint is complete; a failure below does not undo it.
    on_rank0(
        f"writing {layout.TRACKER_NAME}", partial(layout.write_tracker, root, iteration), group
    )
    prune = partial(_prune, root, iteration, keep_last, keep_every, attempt)
    on_rank0("deleting old checkpoints", prune, group)
    return layout.final_path(root, iteration)


def _write(
    directory: Path, iteration: int, staged: StagedCheckpoint, group: dist.ProcessGroup | None
) -> None:
    """Write a complete checkpoint into the new `directory`, including its manifest."""
    prepare = partial(_write_rank0_files, directory, staged)
    on_rank0("writing common.pt", prepare, group)

    write_shards = partial(_write_shards, directory, staged.shards, group)
    on_all_ranks("writing the shards", write_shards, group)

    finish = partial(save_config, CheckpointingConfig("torch_dist"), str(directory))
    on_rank0("writing metadata.json", finish, group)
    records: dict[str, FileRecord] = {}
    mine = on_all_ranks("hashing the files", partial(_hash_own, directory, rank_of(group)), group)
    for part in gather(mine, group):
        records.update(part)
    on_rank0("writing the manifest", partial(write_manifest, directory, iteration, records), group)


def _to_torch(sharded: ShardedStateDict, *, is_copied: bool) -> dict[str, Any]:
    """Return this rank's main replicas in the form of torch's checkpoint planner.

    Raises:
        CheckpointError: an object's data could not be loaded back.
    """
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    if is_copied:
        _copy_to_host(flat)
    shards: dict[str, Any] = mcore_to_pyt_state_dict(flat, False)
    for key, value in shards.items():
        if isinstance(value, io.BytesIO):
            value.seek(0)
            _check_loadable(value, f"object {key}")
            value.seek(0)
    return shards


def _copy_to_host(flat: ShardedStateDict) -> None:
    """Replace the tensors of a state by copies in host memory, pinned for those on a GPU."""
    is_on_gpu = False
    for entry in nested_values(flat):
        if isinstance(entry, ShardedTensor) and entry.data is not None:
            data = entry.data.detach()
            copy = torch.empty_like(data, device="cpu", pin_memory=data.is_cuda)
            entry.data = copy.copy_(data, non_blocking=True)
            is_on_gpu |= data.is_cuda
    if is_on_gpu:
        torch.cuda.current_stream().synchronize()


class _Writer(dcp.FileSystemWriter):
    """Writes one rank's shards; torch gathers the errors of all ranks without what caused them."""

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write as torch does, and raise the OSError of a failed write."""
        with write_errors_kept():
            return super().write_data(plan, planner)


def _write_shards(
    directory: Path, shards: Mapping[str, Any], group: dist.ProcessGroup | None
) -> None:
    """Let torch write; it gathers the failures of all ranks before it raises on each."""
    with torch_errors_explained("writing the shards"):
        dcp.save(
            dict(shards),
            # One file a rank, in this process, forced to disk.
            storage_writer=_Writer(directory, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )


def _serialize(common: dict[str, Any]) -> bytes:
    """Serialize the unsharded state as `common.pt`.

    Raises:
        CheckpointError: it could not be loaded back.
    """
    content = io.BytesIO()
    torch.save(common, content)
    content.seek(0)
    _check_loadable(content, "the unsharded state (common.pt)")
    return content.getvalue()


def _write_rank0_files(directory: Path, staged: StagedCheckpoint) -> None:
    """Make `directory`; write the unsharded state and the small files."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    layout.clear_leftovers(directory.parent)
    directory.mkdir()
    sync_directory(directory.parent)
    (directory / "common.pt").write_bytes(staged.common)
    for name, content in staged.files.items():
        if not is_plain_name(name) or name in _RESERVED_NAMES or name.endswith(".distcp"):
            raise CheckpointError(
                f"a checkpoint cannot hold a file named {name!r}; give a plain name that is not "
                "one of the checkpoint's own"
            )
        if isinstance(content, Path):
            shutil.copyfile(content, directory / name)
        else:
            write_durably(directory / name, content)


def _check_loadable(source: io.BytesIO, name: str) -> None:
    """Read back what was serialized, as loading will: better refused now than lost then."""
    try:
        load_trusted_types(source, name=name)
    except CheckpointError as error:
        cause = error.__cause__
        why = what_it_holds(cause) if isinstance(cause, pickle.UnpicklingError) else str(error)
        raise CheckpointError(
            f"{name} could not be loaded back: {why}; save tensors, numbers, strings, and "
            "lists, tuples or dicts of them"
        ) from error


def _hash_own(directory: Path, rank: int) -> dict[str, FileRecord]:
    """Force to disk and hash the files that this rank wrote, which its node still has in memory."""
    names = list_files(directory)
    if rank == 0:
        return hash_files(directory, [name for name in names if not _is_shard_of_another(name)])
    return hash_files(directory, [name for name in names if name.startswith(f"__{rank}_")])


def _is_shard_of_another(name: str) -> bool:
    """Return whether a rank other than 0 wrote `name`."""
    return name.endswith(".distcp") and not name.startswith("__0_")


def _prune(
    root: Path, iteration: int, keep_last: int | None, keep_every: int | None, attempt: str
) -> None:
    """Delete what was replaced and the checkpoints before the `keep_last` newest."""
    if problems := verify_manifest(layout.final_path(root, iteration), checksums=False):
        logger.warning(
            "the checkpoint of iteration %d is no longer valid (%s); nothing older is deleted",
            iteration,
            problems[0],
        )
        return
    replaced = layout.replaced_path(root, iteration, attempt)
    if replaced.exists():
        logger.info("deleting the earlier checkpoint of iteration %d", iteration)
        layout.remove(replaced)
    if keep_last is None:
        return
    upto = [found for found in layout.final_iterations(root) if found <= iteration]
    for old in upto[:-keep_last]:
        if keep_every is None or old % keep_every:
            logger.info("deleting the checkpoint of iteration %d; keep_last is %d", old, keep_last)
            layout.discard(root, old, attempt)
