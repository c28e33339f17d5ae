"""Measures how fast a rank computes, communicates and writes, and checks the results."""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.trainer.errors import UserError
from megatron.trainer.runtime.launch import RunContext

_PACKAGES = ("torch", "megatron-core", "numpy")
_FIELDS: dict[str, str | None] = {
    "world": None,
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "ep": "ep",
    "etp": "expt_tp",
    "expert dp": "expt_dp",
}
_MESSAGE_ELEMENTS = 1 << 20
MESSAGE_BYTES = 4 * _MESSAGE_ELEMENTS
_REPEATS = 3
_PROBE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


class PreflightError(UserError):
    """Reports a rank that cannot do what the run needs."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """Describes a rank and where it runs."""

    rank: int
    """Its global rank."""
    host: str
    """Name of its machine."""
    pid: int
    """Its process there."""
    device: str
    """Where its tensors live, with the GPU's name."""
    versions: dict[str, str]
    """Of Python and of packages, by name."""


@dataclass(frozen=True, kw_only=True)
class GroupFacts:
    """Holds the measurements of all-reduces in the groups of one kind, all at the same time."""

    name: str
    """The kind: world, tp, ..."""
    num_ranks: int
    """Ranks in each."""
    latency_s: float
    """Of one number; the slowest rank's best time."""
    message_s: float
    """Of MESSAGE_BYTES, likewise."""
    is_right: bool
    """Whether every rank got the right sums."""

    @property
    def bytes_per_s(self) -> float:
        """Return what each rank of a ring sends and receives in a second ("bus bandwidth")."""
        return 2 * (self.num_ranks - 1) / self.num_ranks * MESSAGE_BYTES / self.message_s


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """Describes the directory of checkpoints, as one rank of a node sees it."""

    host: str
    """The node."""
    directory: str
    """What was measured: the directory, or the nearest one above it that exists."""
    free_bytes: int
    """That this user may still write."""
    bytes_per_s: float
    """Written and forced to disk, one file."""


def own_facts(ctx: RunContext) -> RankFacts:
    """Describe this rank."""
    device = str(ctx.device)
    if ctx.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(ctx.device)})"
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return RankFacts(
        rank=ctx.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=device,
        versions={"python": sys.version.partition(" ")[0], **versions},
    )


def multiply(device: torch.device) -> tuple[float, bool]:
    """Multiply two matrices of small integers, whose sums fp32 computes exactly.

    Returns:
        FLOP/s, and whether the product is right: its rows' sums are known without it.
    """
    size = 512 if device.type == "cpu" else 4096
    index = torch.arange(size)
    left = (index[:, None] * 3 + index) % 5  # [n, n]
    right = (index[:, None] + index * 7) % 3  # [n, n]
    a, b = left.to(device, torch.float32), right.to(device, torch.float32)
    timed = [_timed(lambda: torch.mm(a, b), device) for _ in range(1 + _REPEATS)]
    product, seconds = timed[0][0], min(seconds for _, seconds in timed)
    is_right = torch.equal(product.double().sum(1).long().cpu(), left @ right.sum(1))
    return 2 * size**3 / seconds, is_right


def _timed(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def kinds_of_groups(ctx: RunContext) -> dict[str, dist.ProcessGroup]:
    """Return this rank's groups by kind."""
    world: Any = dist.group.WORLD
    return {
        kind: world if field is None else getattr(ctx.groups, field)
        for kind, field in _FIELDS.items()
    }


def measure_all_reduce(
    ctx: RunContext, ranks: Sequence[RankFacts], kind: str, group: dist.ProcessGroup
) -> GroupFacts:
    """All-reduce one number and MESSAGE_BYTES; all groups of a kind at once, as in a run."""
    members = dist.get_process_group_ranks(group)
    expected = float(sum(_share(rank) for rank in members))
    best, is_right = {}, True
    try:
        dist.barrier()
        for size in (1, _MESSAGE_ELEMENTS):
            seconds = []
            for _ in range(_REPEATS):
                numbers = torch.full((size,), _share(ctx.rank), device=ctx.device)
                _, took = _timed(partial(dist.all_reduce, numbers, group=group), ctx.device)
                seconds.append(took)
                is_right = is_right and bool((numbers == expected).all())
            best[size] = min(seconds)
    except RuntimeError as failure:
        who = ", ".join(f"{rank} on {ranks[rank].host}" for rank in members[:16])
        error = PreflightError(
            f"the all-reduce of the {kind} group of ranks {who} failed on"
            f" {ranks[ctx.rank].host}: {failure}; check the network between these hosts"
        )
        error.is_local = True
        raise error from failure
    return GroupFacts(
        name=kind,
        num_ranks=len(members),
        latency_s=best[1],
        message_s=best[_MESSAGE_ELEMENTS],
        is_right=is_right,
    )


def _share(rank: int) -> float:
    """Return a rank's term of a sum: unlike its neighbours', and small enough to add exactly."""
    return float(rank % 97 + 1)


def slowest_of(each: Sequence[GroupFacts]) -> GroupFacts:
    """Combine what the ranks measured of one kind of group."""
    return GroupFacts(
        name=each[0].name,
        num_ranks=each[0].num_ranks,
        latency_s=max(facts.latency_s for facts in each),
        message_s=max(facts.message_s for facts in each),
        is_right=all(facts.is_right for facts in each),
    )


def nearest_directory(path: Path) -> Path:
    """Find the directory, or the nearest path above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def appears(probe: Path, *, patience_s: float) -> bool:
    """Return whether another node's new file appears here; network file systems take a moment."""
    deadline = time.monotonic() + patience_s
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def measure_disk(directory: Path) -> DiskFacts:
    """Write a file there, force it to disk, and delete it again.

    Raises:
        OSError: it cannot be written.
    """
    block = os.urandom(_BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(_PROBE_BYTES // _BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    usage = os.statvfs(directory)
    return DiskFacts(
        host=socket.gethostname(),
        directory=str(directory),
        free_bytes=usage.f_bavail * usage.f_frsize,
        bytes_per_s=_PROBE_BYTES / seconds,
    )
