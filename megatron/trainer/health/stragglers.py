"""Finds the rank that the others wait for: the one that is busiest, by its own clock.

In a step that ends with a collective all ranks take equally long. What differs is how much of it a
rank spends waiting for the others; the rest is its busy time.
"""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron.trainer.health.patch_collectives import COLLECTIVES, patched_methods


class _Meter(Protocol):
    """Adds up intervals of time; the sum is asked for at the end."""

    def now(self) -> Any:
        """Take the time."""

    def add(self, start: Any, stop: Any) -> None:
        """Add the time between two moments."""

    def take_seconds(self) -> float:
        """Return the sum, in seconds, and reset it."""


class _HostMeter:
    """Measures on a CPU, where a collective has ended when the call that waits for it returns."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        return time.perf_counter()

    def add(self, start: float, stop: float) -> None:
        self._seconds += stop - start

    def take_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _DeviceMeter:
    """Measures on a GPU, between two events on the compute stream.

    A collective runs on a stream of its own, which the compute stream waits for, or on the compute
    stream; either way the two events are as far apart as nothing else was computed.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> None:
        self._pairs.append((start, stop))

    def take_seconds(self) -> float:
        torch.cuda.synchronize()
        pairs, self._pairs = self._pairs, []
        return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3


class BusyClock:
    """Measures how much of this rank's steps was not spent waiting for other ranks.

        with clock:
            train_step(...)
        record |= clock.reduce()

    Only calls of the thread that takes the steps count; on a GPU, only those on its compute stream.
    megatron-core's overlapped collectives count when they are waited for.

    Args:
        device: of the run's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        make = _HostMeter if device.type == "cpu" else _DeviceMeter
        self._whole: _Meter = make()
        self._waits: _Meter = make()
        self._steps = 0
        self._is_waiting = False

    def __enter__(self) -> None:
        self._thread, self._stream = threading.get_ident(), self._current_stream()
        self._patches = ExitStack()
        self._patches.enter_context(patched_methods(dist.ProcessGroup, COLLECTIVES, self._timed))
        self._patches.enter_context(patched_methods(dist.Work, ("wait",), self._timed))
        self._started = self._whole.now()

    def __exit__(self, *_error: object) -> None:
        self._whole.add(self._started, self._whole.now())
        self._steps += 1
        self._patches.close()

    def reduce(self) -> dict[str, Any]:
        """Find the busiest rank since the last call; a collective call of all ranks.

        Returns:
            `straggler_rank`, and `straggler_ratio`: its busy time over the median rank's (the lower
            of two); the same on every rank. Empty if there was no step.
        """
        whole_s, waited_s = self._whole.take_seconds(), self._waits.take_seconds()
        steps, self._steps = self._steps, 0
        if not steps:
            return {}
        own = torch.tensor([(whole_s - waited_s) / steps], device=self._device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        busy_s = torch.cat(gathered).tolist()
        slowest = busy_s.index(max(busy_s))
        return {
            "straggler_rank": slowest,
            "straggler_ratio": busy_s[slowest] / statistics.median_low(busy_s),
        }

    def measure(self, call: Callable[..., Any], arguments: tuple[Any, ...], named: Any) -> Any:
        """Count the time of a call as waiting, unless it is part of one that counts already."""
        if self._is_waiting or not self._is_ours():
            return call(*arguments, **named)
        self._is_waiting = True
        started = self._waits.now()
        try:
            return call(*arguments, **named)
        finally:
            self._waits.add(started, self._waits.now())
            self._is_waiting = False

    def _current_stream(self) -> object:
        return None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)

    def _timed(self, _name: str, original: Callable[..., Any]) -> "TimedMethod":
        return TimedMethod(self, original)

    def _is_ours(self) -> bool:
        if self._device.type == "cpu":
            return threading.get_ident() == self._thread
        # On a GPU the backward pass has threads of its own, which compute on the same stream.
        return self._current_stream() == self._stream


class TimedMethod:
    """Stands for a method of a class of torch while a clock measures it.

    Args:
        clock: what counts the time.
        original: the method, which takes the instance first.
    """

    def __init__(self, clock: BusyClock, original: Callable[..., Any]) -> None:
        self._clock = clock
        self._original = original

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the method."""
        return self._clock.measure(self._original, arguments, named)


CLOCK_CODES = frozenset({BusyClock.measure.__code__, TimedMethod.__call__.__code__})
"""Of the functions that stand between a collective and its caller while a clock measures it."""
