"""Finds the rank that blocks a run, from the heartbeats of all ranks.

`TrainingThread` samples what a heartbeat says: whether the thread that trains does anything, and
where it is. `find_hang` compares the heartbeats. `watchdog` sends and collects them.
"""

import dis
import functools
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch.distributed import _functional_collectives, distributed_c10d

from megatron.trainer.checkpoint.background import THREAD_NAME as WRITING_THREAD_NAME
from megatron.trainer.data.read_ahead import THREAD_NAME as READING_THREAD_NAME
from megatron.trainer.health.stragglers import CLOCK_CODES

BUSY_SHARE = 0.01
"""Of the time between two samples: a thread that computed for less than that is idle."""
_SHOWN_FRAMES = 3
_SHOWN_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Says how far a rank has got; sent every few seconds."""

    host: str
    """Name of its machine."""
    pid: int
    """Its process there."""
    number: int
    """Counts the rank's heartbeats."""
    stage: str
    """The stage that it began last."""
    iteration: int
    """Of which step."""
    num_stages: int
    """Stages that it has begun; every rank begins the same ones."""
    stage_age_s: float
    """Seconds since the last began."""
    idle_s: float
    """Seconds since its training thread last did anything."""
    is_waiting: bool
    """Whether that thread waits for other ranks."""
    has_left: bool = False
    """Whether it has left the run; it is watched no more."""
    frames: tuple[str, ...] = ()
    """Where the thread is, innermost frame first."""

    def to_json(self) -> str:
        """Serialise it for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Parse what `to_json` returned."""
        fields = json.loads(text)
        return cls(**{**fields, "frames": tuple(fields["frames"])})


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Holds what one rank has received from another."""

    heartbeat: Heartbeat | None
    """The newest; None if there was none."""
    silent_s: float
    """Seconds without another."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Describes a run in which nothing happens any more."""

    reporter: int
    """The lowest rank that still sends heartbeats: it reports."""
    culprits: tuple[int, ...]
    """The ranks that the others wait for; empty if none stands out."""
    message: str
    """Who they are, where, and how one knows."""


class TrainingThread:
    """Samples the thread that trains, and those that read for it, from another thread.

    Args:
        thread: of this process; it is running.
        device: of the run's tensors.
    """

    def __init__(self, thread: threading.Thread, device: torch.device) -> None:
        assert thread.ident is not None
        self._ident = thread.ident
        self._counters = Path(f"/proc/self/task/{thread.native_id}/io")
        self._device = device
        get_clock = getattr(time, "pthread_getcpuclockid", None)  # not on every system
        self._clock = None if get_clock is None else get_clock(thread.ident)
        self._sampled_at, self._computed_s, self._done = time.monotonic(), *self._activity()
        self._active_at = self._sampled_at

    def sample(self) -> tuple[float, bool]:
        """Compare with the last sample.

        Returns:
            Seconds since the thread last did anything, and whether the GPU still has work to do.
        """
        now, (computed_s, done) = time.monotonic(), self._activity()
        # A thread that waits for the GPU spins; its processor time says nothing then.
        is_gpu_busy = self._device.type == "cuda" and not _is_idle(self._device)
        share = (computed_s - self._computed_s) / max(now - self._sampled_at, 1e-9)
        if done != self._done or (share > BUSY_SHARE and not is_gpu_busy):
            self._active_at = now
        self._sampled_at, self._computed_s, self._done = now, computed_s, done
        return now - self._active_at, is_gpu_busy

    def stack(self) -> tuple[bool, tuple[str, ...]]:
        """Return whether it waits in torch.distributed, and where it is, innermost frame first."""
        frame = sys._current_frames().get(self._ident)
        return waits_in_collective(frame), describe_frames(frame)

    def _activity(self) -> tuple[float, tuple[int, ...]]:
        """Return processor seconds, and counters that nothing but work changes."""
        computed = time.process_time() if self._clock is None else time.clock_gettime(self._clock)
        done = (*_io_counters(self._counters), *_helper_counters())
        if self._device.type == "cuda":
            done = (*done, torch.cuda.memory_stats(self._device)["allocation.all.allocated"])
        return computed, done


def _is_idle(device: torch.device) -> bool:
    return torch.cuda.default_stream(device).query()


def _io_counters(file: Path) -> tuple[int, ...]:
    """Read how many bytes a thread has read and written; () where the system does not say."""
    try:
        text = file.read_text("ascii")
    except OSError:
        return ()
    return tuple(int(line.partition(":")[2]) for line in text.splitlines())


def _helper_counters() -> tuple[int, ...]:
    """Read bytes moved and nanoseconds computed by the threads that read ahead or write.

    Where the thread that trains waits for a batch or a checkpoint, only they do anything. They stop
    at a bounded number of batches and at one checkpoint, so they cannot hide a hang elsewhere.
    """
    counters: list[int] = []
    for thread in threading.enumerate():
        if thread.name.startswith((READING_THREAD_NAME, WRITING_THREAD_NAME)):
            task = Path(f"/proc/self/task/{thread.native_id}")
            counters += _io_counters(task / "io")
            try:
                counters.append(int((task / "schedstat").read_text("ascii").split()[0]))
            except (OSError, ValueError, IndexError):
                continue
    return tuple(counters)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@functools.cache
def _collective_codes() -> frozenset[CodeType]:
    """Collect the functions in which a rank may wait for others."""
    found = set(CLOCK_CODES)
    for module in (distributed_c10d, _functional_collectives):
        for value in vars(module).values():
            # Not isinstance: a deprecated object there warns when it is asked for anything.
            is_code = issubclass(type(value), FunctionType | type)
            if is_code and value.__module__ == module.__name__:  # not imported from elsewhere
                members = vars(value).values() if isinstance(value, type) else (value,)
                found.update(code for member in members for code in _codes_of(member))
    return frozenset(found)


def _codes_of(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function, and of those that it decorates."""
    while isinstance(function, FunctionType):
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _package(frame: FrameType) -> str:
    """Name the top-level package that a frame's function was defined in."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def waits_in_collective(frame: FrameType | None) -> bool:
    """Return whether a thread is inside a collective, or waits for one that it has begun.

    Args:
        frame: the thread's innermost.
    """
    for each in _outwards(frame):
        if each.f_code in _collective_codes():
            return True
        if _package(each) != "torch":
            break
    # What a collective returns is of a C type, so waiting for it has no frame of its own.
    return frame is not None and _called_method(frame) == "wait"


def _called_method(frame: FrameType) -> str | None:
    """Name the attribute that a frame looked up last, most likely to call it."""
    found = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:
            break
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found = instruction.argval
    return found


def describe_frames(frame: FrameType | None) -> tuple[str, ...]:
    """List the innermost frames outside torch and Python, as "a/b.py:line in function"."""
    found = []
    for each in _outwards(frame):
        is_library = _package(each) in {"torch", *sys.stdlib_module_names}
        if not is_library and each.f_code not in CLOCK_CODES:
            short = "/".join(Path(each.f_code.co_filename).parts[-3:])
            found.append(f"{short}:{each.f_lineno} in {each.f_code.co_name}")
        if len(found) == _SHOWN_FRAMES:
            break
    return tuple(found)


def find_hang(observations: Mapping[int, Observation], *, timeout_s: float) -> Hang | None:
    """Find out whether a run hangs, and which ranks block it.

    It hangs when no rank that sends heartbeats has begun a stage for `timeout_s`, and either one of
    them has waited for others all that time, or none of them has done anything. Ranks that compute
    for longer than `timeout_s` do not hang while nobody waits for them.

    Args:
        observations: of every rank.
        timeout_s: as above; a rank without a heartbeat for half of it is lost.

    Returns:
        None if the run makes progress.
    """
    going = {
        rank: seen
        for rank, seen in sorted(observations.items())
        if seen.heartbeat is None or not seen.heartbeat.has_left
    }
    lost = [rank for rank, seen in going.items() if seen.silent_s >= timeout_s / 2]
    alive = {rank: seen.heartbeat for rank, seen in going.items() if rank not in lost}
    if not alive:
        return None
    heartbeats = {rank: heartbeat for rank, heartbeat in alive.items() if heartbeat is not None}
    if (
        len(heartbeats) < len(alive)
        or min(heartbeat.stage_age_s for heartbeat in heartbeats.values()) < timeout_s
    ):
        return None
    idle = [rank for rank, heartbeat in heartbeats.items() if heartbeat.idle_s >= timeout_s]
    if not any(heartbeats[rank].is_waiting for rank in idle) and len(idle) < len(heartbeats):
        return None
    culprits = lost or _culprits(heartbeats)
    lines = [
        _headline(culprits, observations, timeout_s),
        *_culprit_lines(culprits, lost, observations, timeout_s),
        *_other_lines(
            {rank: heartbeat for rank, heartbeat in heartbeats.items() if rank not in culprits}
        ),
    ]
    over = sorted(observations.keys() - going.keys())
    if over:
        lines.append(f"  {_name_ranks(over)} left the run before")
    return Hang(reporter=min(heartbeats), culprits=tuple(culprits), message="\n".join(lines))


def _culprits(heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """Select the ranks that wait for no other; else those behind the others; else none."""
    free = [rank for rank, heartbeat in heartbeats.items() if not heartbeat.is_waiting]
    most = max(heartbeat.num_stages for heartbeat in heartbeats.values())
    return free or [rank for rank, heartbeat in heartbeats.items() if heartbeat.num_stages < most]


def _headline(
    culprits: Sequence[int], observations: Mapping[int, Observation], timeout_s: float
) -> str:
    head = f"no rank has made progress for {timeout_s:g} s"
    if not culprits:
        return (
            f"{head}, and none stands out: all wait for each other. The network between them may be"
            " down, or they call different collectives"
        )
    names = ", ".join(_name(rank, observations) for rank in culprits[:_SHOWN_RANKS])
    more = len(culprits) - _SHOWN_RANKS
    rest = f" and {more} more" if more > 0 else ""
    return f"{head}: {names}{rest} {'hangs' if len(culprits) == 1 else 'hang'}"


def _name(rank: int, observations: Mapping[int, Observation]) -> str:
    heartbeat = observations[rank].heartbeat
    if heartbeat is not None:
        return f"rank {rank} on {heartbeat.host}"
    around = (observations.get(rank - 1), observations.get(rank + 1))
    hosts = sorted({seen.heartbeat.host for seen in around if seen is not None and seen.heartbeat})
    beside = " and ".join(hosts)
    return f"rank {rank} ({f'beside {beside}' if beside else 'host not known'})"


def _culprit_lines(
    culprits: Sequence[int],
    lost: Sequence[int],
    observations: Mapping[int, Observation],
    timeout_s: float,
) -> list[str]:
    most = max((s.heartbeat.num_stages for s in observations.values() if s.heartbeat), default=0)
    lines = []
    for rank in culprits[:_SHOWN_RANKS]:
        seen = observations[rank]
        heartbeat = seen.heartbeat
        if heartbeat is None:
            lines.append(
                f"  rank {rank} has sent no heartbeat: it has not got as far as the others, its"
                " process is stopped, or its node is gone"
            )
            continue
        where = f"  rank {rank} on {heartbeat.host}, pid {heartbeat.pid}, {_place(heartbeat)}:"
        if rank in lost:
            where = where.replace(_place(heartbeat), f"last heartbeat in {_place(heartbeat)}")
            how = "silent: its process is stopped or frozen, or its node is gone"
        elif heartbeat.is_waiting:
            how = "waits for others, but in another place"
        elif heartbeat.idle_s >= timeout_s / 2:  # its last heartbeat may be a little old
            how = "is idle and waits for no other rank"
        else:
            how = "is busy while others wait for it"
        if most > heartbeat.num_stages and rank not in lost:
            how += f"; {most - heartbeat.num_stages} stage(s) behind the first"
        lines.append(f"{where} {how}")
        lines += [] if rank in lost else [f"    at {each}" for each in heartbeat.frames]
    return lines


def _other_lines(heartbeats: Mapping[int, Heartbeat]) -> list[str]:
    """Write a line for all ranks that are in the same place."""
    together: dict[tuple[str, str], list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        key = (_place(heartbeat), heartbeat.frames[0] if heartbeat.frames else "a place not known")
        together.setdefault(key, []).append(rank)
    return [
        f"  {_name_ranks(ranks)}, {place}: waiting at {where}"
        for (place, where), ranks in list(together.items())[:_SHOWN_RANKS]
    ]


def _place(heartbeat: Heartbeat) -> str:
    return f"stage '{heartbeat.stage}' of iteration {heartbeat.iteration}"


def _name_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as in "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
