"""Which rank the others wait for: the one that is busiest, by its own clock.

In a step that ends with a collective all ranks take equally long. What differs is how much of it a
rank spends waiting for the others; the rest is its busy time.
"""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron.trainer.health.patch_collectives import COLLECTIVES, replaced


class _Meter(Protocol):
    """Measures stretches of time; what it measured is asked for at last."""

    def now(self) -> Any:
        """A moment."""

    def add(self, start: Any, stop: Any) -> None:
        """Count the time between two moments."""

    def take_seconds(self) -> float:
        """The sum of all that was counted; begins anew."""


class _HostMeter:
    """For a CPU, where a collective has ended when the call that waits for it returns."""

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
    """For a GPU: the time between two events on the stream that computes.

    A collective runs on a stream of its own, which the computing one waits for, or on the computing
    one; either way the events around the call are apart by as long as nothing else was computed.
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

    Only calls of the thread that takes the steps count; on a GPU, only those on the stream that
    computes. megatron-core's overlapped collectives count when they are waited for.

    Args:
        device: where the run's tensors live.
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
        self._replaced = ExitStack()
        self._replaced.enter_context(replaced(dist.ProcessGroup, COLLECTIVES, self._wrap))
        self._replaced.enter_context(replaced(dist.Work, ("wait",), self._wrap))
        self._started = self._whole.now()

    def __exit__(self, *_error: object) -> None:
        self._whole.add(self._started, self._whole.now())
        self._steps += 1
        self._replaced.close()

    def reduce(self) -> dict[str, Any]:
        """The busiest rank since the last call; a collective call of all ranks.

        Returns:
            `straggler_rank`, and by `straggler_ratio` how much busier it was than the rank in the
            middle (the lower one of two); the same on every rank. Nothing if there was no step.
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

    def _current_stream(self) -> object:
        return None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)

    def _wrap(self, _name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._is_waiting or not self._is_ours():
                return original(*arguments, **named)
            self._is_waiting = True
            started = self._waits.now()
            try:
                return original(*arguments, **named)
            finally:
                self._waits.add(started, self._waits.now())
                self._is_waiting = False

        return call

    def _is_ours(self) -> bool:
        if self._device.type == "cpu":
            return threading.get_ident() == self._thread
        # On a GPU the backward pass has threads of its own, which compute on the same stream.
        return self._current_stream() == self._stream
