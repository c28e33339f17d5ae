"""Checks before a run begins what every rank sees, computes, communicates and writes.

A rank that hangs on the way is named by a watchdog of its own, with its host and what it was doing.
"""

import contextlib
import itertools
import json
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.trainer.health.rank_checks import (
    DiskFacts,
    GroupFacts,
    PreflightError,
    RankFacts,
    appears,
    kinds_of_groups,
    measure_all_reduce,
    measure_disk,
    multiply,
    nearest_directory,
    own_facts,
    slowest_of,
)
from megatron.trainer.health.watchdog import Watchdog
from megatron.trainer.runtime.launch import RunContext

_STATUS = 2
_SHARE_OF_TIMEOUT = 0.8  # the watchdog needs a little longer than its timeout
_LARGEST_SKEW_S = 1.0
_SHARING_TIME_S = 5.0
_SLOW_SHARE = 0.8

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Holds the results of the checks; the same on every rank."""

    ranks: tuple[RankFacts, ...]
    """By rank."""
    flops: tuple[float, ...]
    """FLOP/s of a product in fp32, by rank."""
    groups: tuple[GroupFacts, ...]
    """By kind."""
    disks: tuple[DiskFacts, ...]
    """One a node; none without a directory to save in."""
    warnings: tuple[str, ...]
    """What may be meant, and may not."""
    problems: tuple[str, ...]
    """Problems that would stop a run."""


def preflight(ctx: RunContext, *, timeout_s: float, save: Path | None) -> list[str]:
    """Check that every rank answers, computes, communicates and writes; a collective call.

    Args:
        ctx: where this rank stands.
        timeout_s: after which a rank that hangs is named; the processes then end with status 2.
        save: where checkpoints will be written; None for a run that writes none.

    Returns:
        What was found, a line each; for the log.

    Raises:
        PreflightError: a rank computes or receives wrong numbers, or cannot write; on all ranks
            alike, except where a collective fails: the ranks that it fails on report it.
    """
    findings = examine(ctx, timeout_s=timeout_s, save=save)
    if findings.problems:
        raise PreflightError("\n".join(findings.problems))
    return [f"pre-flight: {line}" for line in describe(findings)]


def examine(ctx: RunContext, *, timeout_s: float, save: Path | None) -> Findings:
    """Check as `preflight` does, but return what is wrong instead of raising it."""
    watchdog = Watchdog(
        rank=ctx.rank,
        world_size=ctx.world_size,
        timeout_s=_SHARE_OF_TIMEOUT * timeout_s,
        device=ctx.device,
        status=_STATUS,
    )
    watchdog.start()
    try:
        return _examine(ctx, watchdog, _Exchange(ctx, watchdog), save)
    finally:
        watchdog.stop()


class _Exchange:
    """Gathers a value of every rank on all of them, through the store: collectives may not work."""

    def __init__(self, ctx: RunContext, watchdog: Watchdog) -> None:
        self._rank, self._world_size = ctx.rank, ctx.world_size
        self._watchdog = watchdog
        name = f"preflight/{next(_numbers)}"
        self._store: dist.Store | None = None
        if ctx.world_size > 1:
            self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())

    def __call__(self, topic: str, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank, each after a round trip through JSON."""
        if self._store is None:
            return [value]
        self._store.set(f"{topic}/{self._rank}", json.dumps(value))
        with self._watchdog.waiting():
            values = self._store.multi_get([f"{topic}/{rank}" for rank in range(self._world_size)])
        return [json.loads(each) for each in values]


def _examine(
    ctx: RunContext, watchdog: Watchdog, exchange: _Exchange, save: Path | None
) -> Findings:
    watchdog.on_stage("describing ranks", 0)
    ranks = tuple(RankFacts(**each) for each in exchange("ranks", asdict(own_facts(ctx))))

    watchdog.on_stage("multiplying matrices", 0)
    flops, is_right = multiply(ctx.device)
    groups = []
    for kind, group in kinds_of_groups(ctx).items():
        watchdog.on_stage(f"all-reduce, {kind}", 0)
        groups.append(measure_all_reduce(ctx, ranks, kind, group))
    watchdog.on_stage("comparing clocks", 0)
    dist.barrier()
    clock = time.time()

    watchdog.on_stage("writing to --save", 0)
    disk, disk_problem = None, None
    if save is not None:
        disk, disk_problem = _examine_disk(ctx, ranks, exchange, save)
    watchdog.on_stage("gathering results", 0)
    own = {
        "flops": flops,
        "is_right": is_right,
        "groups": [asdict(each) for each in groups],
        "clock": clock,
        "disk": None if disk is None else asdict(disk),
        "disk_problem": disk_problem,
    }
    found = exchange("findings", own)
    measured = tuple(
        slowest_of([GroupFacts(**each["groups"][index]) for each in found])
        for index in range(len(groups))
    )
    return Findings(
        ranks=ranks,
        flops=tuple(each["flops"] for each in found),
        groups=measured,
        disks=tuple(DiskFacts(**each["disk"]) for each in found if each["disk"] is not None),
        warnings=(
            *_version_warnings(ranks),
            *_clock_warnings(ranks, [each["clock"] for each in found]),
            *_speed_warnings(ranks, [each["flops"] for each in found]),
        ),
        problems=(*_problems(ranks, found),),
    )


def _examine_disk(
    ctx: RunContext, ranks: Sequence[RankFacts], exchange: _Exchange, save: Path
) -> tuple[DiskFacts | None, str | None]:
    """Measure the disk on the first rank of each node; check that all nodes see one directory."""
    host = ranks[ctx.rank].host
    is_first = ctx.rank == min(each.rank for each in ranks if each.host == host)
    directory = nearest_directory(save)
    token = exchange("token", secrets.token_hex(8))[0]
    probe = directory / f".preflight-{token}"
    disk, problem = None, None
    try:
        if ctx.rank == 0:
            probe.touch()
        if is_first:
            disk = measure_disk(directory)
    except OSError as error:
        problem = (
            f"cannot write to {directory} for --save {save} on {host}: {error.strerror}; give a"
            " directory on a disk with room that this user may write to"
        )
    is_there = exchange("probe", problem is None)[0]  # rank 0 has made it
    must_see = is_first and is_there and problem is None
    if must_see and not appears(probe, patience_s=_SHARING_TIME_S):
        problem = (
            f"--save {save} is another directory on {host} than on {ranks[0].host}; checkpoints"
            " need one file system that all nodes share"
        )
    exchange("seen", True)
    if ctx.rank == 0:
        with contextlib.suppress(OSError):  # it was not made, which is reported above
            probe.unlink()
    return disk, problem


def _version_warnings(ranks: Sequence[RankFacts]) -> list[str]:
    found = []
    for name in ranks[0].versions:
        hosts: dict[str, set[str]] = {}
        for each in ranks:
            hosts.setdefault(each.versions[name], set()).add(each.host)
        if len(hosts) > 1:
            where = "; ".join(
                f"{version} on {', '.join(sorted(hosts[version]))}" for version in sorted(hosts)
            )
            found.append(f"ranks differ in {name}: {where}")
    return found


def _clock_warnings(ranks: Sequence[RankFacts], clocks: Sequence[float]) -> list[str]:
    """Warn of hosts whose clocks are off, so that their logs cannot be compared."""
    usual = statistics.median_low(clocks)
    off: dict[str, float] = {}
    for each, clock in zip(ranks, clocks, strict=True):
        if abs(clock - usual) > _LARGEST_SKEW_S:
            off[each.host] = clock - usual
    return [
        f"the clock of {host} is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the"
        " others'; their logs do not fit together"
        for host, skew in off.items()
    ]


def _speed_warnings(ranks: Sequence[RankFacts], flops: Sequence[float]) -> list[str]:
    """Warn of GPUs that are slower than the others; CPUs are shared, and vary by themselves."""
    usual = statistics.median(flops)
    return [
        f"rank {each.rank} on {each.host} ({each.device}) multiplies at {speed / 1e9:,.0f} GFLOP/s,"
        f" the others at {usual / 1e9:,.0f}; all will wait for it"
        for each, speed in zip(ranks, flops, strict=True)
        if each.device.startswith("cuda") and speed < _SLOW_SHARE * usual
    ]


def _problems(ranks: Sequence[RankFacts], found: Sequence[Mapping[str, Any]]) -> list[str]:
    problems = []
    for each, facts in zip(ranks, found, strict=True):
        where = f"rank {each.rank} on {each.host} ({each.device})"
        if not facts["is_right"]:
            problems.append(
                f"{where} multiplies two matrices and gets a wrong product; leave this device out"
            )
        wrong = [group["name"] for group in facts["groups"] if not group["is_right"]]
        if wrong:
            problems.append(
                f"{where} gets wrong sums from the all-reduce of {', '.join(wrong)}; check its"
                " links and its communication library"
            )
        if facts["disk_problem"] is not None:
            problems.append(facts["disk_problem"])
    return problems


def describe(findings: Findings) -> list[str]:
    """Describe the findings in lines of a log, warnings last."""
    ranks, flops = findings.ranks, findings.flops
    hosts = list(dict.fromkeys(each.host for each in ranks))
    versions = ", ".join(f"{name} {version}" for name, version in ranks[0].versions.items())
    slowest = ranks[flops.index(min(flops))]
    lines = [
        f"{len(ranks)} rank(s) on {len(hosts)} node(s) answer: {versions}",
        f"products are right; {min(flops) / 1e9:,.0f} to {max(flops) / 1e9:,.0f} GFLOP/s in fp32,"
        f" slowest rank {slowest.rank} on {slowest.host}",
        "all-reduce of one number and of 4 MiB: "
        + "; ".join(
            f"{each.name} ({each.num_ranks}) {each.latency_s * 1e3:.2f} and"
            f" {each.message_s * 1e3:.2f} ms"
            for each in findings.groups
            if each.num_ranks > 1 or each.name == "world"
        ),
    ]
    lines += [
        f"{disk.host} writes {disk.bytes_per_s / 1e6:,.0f} MB/s to {disk.directory},"
        f" {disk.free_bytes / 2**30:,.1f} GiB free"
        for disk in findings.disks
    ]
    return [*lines, *(f"warning: {each}" for each in findings.warnings)]
