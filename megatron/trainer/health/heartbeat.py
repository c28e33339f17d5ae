"""Which rank keeps a run from going on, told from what every rank says of itself.

`TrainingThread` is what a rank can say: whether the thread that trains does anything, and where it
is. `find_hang` compares what all of them say. The threads and the store between are `watchdog`'s.
"""

import dis
import json
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_CLOCK = str(Path(__file__).with_name("stragglers.py"))
"""Where collectives are called from while the clock of --log-straggler measures them."""
MOVING_SHARE = 0.01
"""Of the time between two looks: a thread that computed for less than that stands still."""
_SHOWN_FRAMES = 3
_SHOWN_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself every few seconds."""

    host: str
    """Name of its machine."""
    pid: int
    """Its process there."""
    number: int
    """Counts its beats."""
    stage: str
    """What it does, by its last mark."""
    iteration: int
    """Of which step."""
    marks: int
    """Marks it has made; every rank makes the same ones."""
    mark_age_s: float
    """Seconds since the last."""
    still_s: float
    """Seconds since its training thread last did anything."""
    is_waiting: bool
    """Whether that thread waits for other ranks."""
    is_over: bool = False
    """It has left the run, and is not watched any more."""
    where: tuple[str, ...] = ()
    """Where the thread is, innermost first."""

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        """From the store."""
        fields = json.loads(text)
        return cls(**{**fields, "where": tuple(fields["where"])})


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What a rank that looks for a hang has seen of a rank."""

    beat: Beat | None
    """The newest; None if there was none."""
    silent_s: float
    """For how long there was no other."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Nothing moves any more."""

    speaker: int
    """The lowest rank that is well enough to say so."""
    culprits: tuple[int, ...]
    """The ranks that the others wait for; empty if none stands out."""
    message: str
    """Who they are, where, and how one knows."""


class TrainingThread:
    """Looks at the thread that trains, from another one.

    Args:
        thread: of this process; it runs.
        device: where the run's tensors live.
    """

    def __init__(self, thread: threading.Thread, device: torch.device) -> None:
        assert thread.ident is not None
        self._ident = thread.ident
        self._counters = Path(f"/proc/self/task/{thread.native_id}/io")
        self._device = device
        get_clock = getattr(time, "pthread_getcpuclockid", None)  # not on every system
        self._clock = None if get_clock is None else get_clock(thread.ident)
        self._seen_at, self._computed_s, self._done = time.monotonic(), *self._signs()
        self._moved_at = self._seen_at

    def look(self) -> tuple[float, bool]:
        """Whether it did anything since the last look.

        Returns:
            For how many seconds it has not, and whether the GPU still has work of it to do.
        """
        now, (computed_s, done) = time.monotonic(), self._signs()
        # A thread that waits for the GPU spins; what it computes then says nothing.
        is_gpu_busy = self._device.type == "cuda" and not _is_idle(self._device)
        share = (computed_s - self._computed_s) / max(now - self._seen_at, 1e-9)
        if done != self._done or (share > MOVING_SHARE and not is_gpu_busy):
            self._moved_at = now
        self._seen_at, self._computed_s, self._done = now, computed_s, done
        return now - self._moved_at, is_gpu_busy

    def stack(self) -> tuple[bool, tuple[str, ...]]:
        """Whether it waits in torch.distributed, and where it is, innermost frame first."""
        frame = sys._current_frames().get(self._ident)
        return waits_in_collective(frame), describe_frames(frame)

    def _signs(self) -> tuple[float, tuple[int, ...]]:
        """Processor seconds, and counters that nothing but work moves."""
        computed = time.process_time() if self._clock is None else time.clock_gettime(self._clock)
        done = _counts(self._counters)
        if self._device.type == "cuda":
            done = (*done, torch.cuda.memory_stats(self._device)["allocation.all.allocated"])
        return computed, done


def _is_idle(device: torch.device) -> bool:
    return torch.cuda.default_stream(device).query()


def _counts(file: Path) -> tuple[int, ...]:
    """Bytes read and written by a thread; () where the system does not tell."""
    try:
        text = file.read_text("ascii")
    except OSError:
        return ()
    return tuple(int(line.partition(":")[2]) for line in text.splitlines())


def _outwards(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def waits_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread is inside a call of torch.distributed, or waits for one that it has begun.

    Args:
        frame: the thread's innermost.
    """
    for each in _outwards(frame):
        file = each.f_code.co_filename
        if file.startswith((f"{_TORCH}/distributed", _CLOCK)):
            return True
        if not file.startswith(_TORCH):
            break
    # What a collective returns is of a C type, so waiting for it has no frame of its own.
    return frame is not None and _called_method(frame) == "wait"


def _called_method(frame: FrameType) -> str | None:
    """Name of the attribute that a frame looked up last, most likely to call it."""
    found = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:
            break
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found = instruction.argval
    return found


def describe_frames(frame: FrameType | None) -> tuple[str, ...]:
    """The innermost frames that are not torch's or Python's own, as "a/b.py:line in function"."""
    found = []
    for each in _outwards(frame):
        file = each.f_code.co_filename
        is_pythons = file.startswith((_STANDARD, "<")) and "-packages" not in file
        if not file.startswith((_TORCH, _CLOCK)) and not is_pythons:
            short = "/".join(Path(file).parts[-3:])
            found.append(f"{short}:{each.f_lineno} in {each.f_code.co_name}")
        if len(found) == _SHOWN_FRAMES:
            break
    return tuple(found)


def find_hang(sightings: Mapping[int, Sighting], *, timeout_s: float) -> Hang | None:
    """Say who keeps a run from going on, if anybody does.

    It hangs when no rank that still speaks has made a mark for `timeout_s`, and one of them has
    waited for others without a pause as long, or none of them has done anything as long. Ranks that
    compute for longer than `timeout_s` are not taken for hung while nobody waits for them.

    Args:
        sightings: of every rank.
        timeout_s: of silence, a rank that was silent for half of it is taken for lost.
    """
    going = {
        rank: seen
        for rank, seen in sorted(sightings.items())
        if seen.beat is None or not seen.beat.is_over
    }
    lost = [rank for rank, seen in going.items() if seen.silent_s >= timeout_s / 2]
    alive = {rank: seen.beat for rank, seen in going.items() if rank not in lost}
    if not alive:
        return None
    beats = {rank: beat for rank, beat in alive.items() if beat is not None}
    if len(beats) < len(alive) or min(beat.mark_age_s for beat in beats.values()) < timeout_s:
        return None
    still = [rank for rank, beat in beats.items() if beat.still_s >= timeout_s]
    if not any(beats[rank].is_waiting for rank in still) and len(still) < len(beats):
        return None
    culprits = lost or _culprits(beats)
    lines = [
        _headline(culprits, sightings, timeout_s),
        *_culprit_lines(culprits, lost, sightings, timeout_s),
        *_other_lines({rank: beat for rank, beat in beats.items() if rank not in culprits}),
    ]
    over = sorted(sightings.keys() - going.keys())
    if over:
        lines.append(f"  {_name_ranks(over)} left the run before")
    return Hang(speaker=min(beats), culprits=tuple(culprits), message="\n".join(lines))


def _culprits(beats: Mapping[int, Beat]) -> list[int]:
    """Those who wait for nobody; else those behind; else none."""
    at_large = [rank for rank, beat in beats.items() if not beat.is_waiting]
    most = max(beat.marks for beat in beats.values())
    return at_large or [rank for rank, beat in beats.items() if beat.marks < most]


def _headline(culprits: Sequence[int], sightings: Mapping[int, Sighting], timeout_s: float) -> str:
    head = f"no rank has got any further for {timeout_s:g} s"
    if not culprits:
        return (
            f"{head}, and none stands out: all wait for each other. The network between them may be"
            " down, or they call different collectives"
        )
    names = ", ".join(_name(rank, sightings) for rank in culprits[:_SHOWN_RANKS])
    more = len(culprits) - _SHOWN_RANKS
    rest = f" and {more} more" if more > 0 else ""
    return f"{head}: {names}{rest} {'hangs' if len(culprits) == 1 else 'hang'}"


def _name(rank: int, sightings: Mapping[int, Sighting]) -> str:
    beat = sightings[rank].beat
    if beat is not None:
        return f"rank {rank} on {beat.host}"
    around = (sightings.get(rank - 1), sightings.get(rank + 1))
    hosts = sorted({seen.beat.host for seen in around if seen is not None and seen.beat})
    beside = " and ".join(hosts)
    return f"rank {rank} ({f'beside {beside}' if beside else 'host not known'})"


def _culprit_lines(
    culprits: Sequence[int],
    lost: Sequence[int],
    sightings: Mapping[int, Sighting],
    timeout_s: float,
) -> list[str]:
    most = max((s.beat.marks for s in sightings.values() if s.beat), default=0)
    lines = []
    for rank in culprits[:_SHOWN_RANKS]:
        seen = sightings[rank]
        beat = seen.beat
        if beat is None:
            lines.append(
                f"  rank {rank} has not been heard of: it has not come as far as the others, its"
                " process is stopped, or its node is gone"
            )
            continue
        where = f"  rank {rank} on {beat.host}, pid {beat.pid}, {_place(beat)}:"
        if rank in lost:
            where = where.replace(_place(beat), f"last heard of in {_place(beat)}")
            how = "silent: its process is stopped or frozen, or its node is gone"
        elif beat.is_waiting:
            how = "waits for others, but in another place"
        elif beat.still_s >= timeout_s / 2:  # its last look may be a little old
            how = "stands still and waits for no other rank"
        else:
            how = "is at work while others wait for it"
        if most > beat.marks and rank not in lost:
            how += f"; {most - beat.marks} mark(s) behind the first"
        lines.append(f"{where} {how}")
        lines += [] if rank in lost else [f"    at {each}" for each in beat.where]
    return lines


def _other_lines(beats: Mapping[int, Beat]) -> list[str]:
    """One for all ranks that are in the same place."""
    together: dict[tuple[str, str], list[int]] = {}
    for rank, beat in beats.items():
        key = (_place(beat), beat.where[0] if beat.where else "a place not known")
        together.setdefault(key, []).append(rank)
    return [
        f"  {_name_ranks(ranks)}, {place}: waiting at {where}"
        for (place, where), ranks in list(together.items())[:_SHOWN_RANKS]
    ]


def _place(beat: Beat) -> str:
    return f"stage '{beat.stage}' of iteration {beat.iteration}"


def _name_ranks(ranks: Sequence[int]) -> str:
    """As in "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
