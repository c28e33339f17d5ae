"""Decides whether a run stops before its last step: on a signal, a time limit, an interval."""

import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.trainer.config.schema import RunConfig
from megatron.trainer.runtime import signals


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Says why a run stops early; the same on every rank."""

    reason: str
    """`signal`, `duration` or `interval`."""
    detail: str
    """The same in words."""

    @property
    def requeue(self) -> bool:
        """Return whether it was stopped from outside, and should be started again."""
        return self.reason != "interval"


class StopRule:
    """Decides, between steps and between the batches of an evaluation, for all ranks together.

    Args:
        cfg: the flags.
        device: of this rank, for the all-reduce.
        iteration: steps done when this process began.
        last: steps done when the run is.
    """

    def __init__(self, cfg: RunConfig, *, device: torch.device, iteration: int, last: int) -> None:
        self._cfg = cfg.reliability
        self._last = last
        self._device = device
        self._first = iteration
        self.stop: Stop | None = None
        """The decision; None to go on."""

    def check(self, iteration: int, *, is_evaluating: bool = False) -> Stop | None:
        """Return why to stop, or None; the first reason stays. A collective call.

        Args:
            iteration: steps done.
            is_evaluating: an evaluation is going on, which no interval cuts short.
        """
        if self.stop is None:
            self.stop = self._any_rank()
        if self.stop is None and not is_evaluating:
            self.stop = self._at_interval(iteration)
        return self.stop

    def _any_rank(self) -> Stop | None:
        """All-reduce signals and time limits; a signal may reach this rank later than others."""
        received = signals.received()
        limit = self._cfg.exit_duration_in_mins
        minutes = (time.monotonic() - signals.STARTED) / 60
        is_over = limit is not None and minutes >= limit
        noted = torch.tensor([int(received or 0), int(is_over)], device=self._device)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        number, over = noted.tolist()
        if number:
            return Stop(reason="signal", detail=f"{signal.Signals(number).name} received")
        if over:
            return Stop(reason="duration", detail=f"--exit-duration-in-mins {limit:g} are over")
        return None

    def _at_interval(self, iteration: int) -> Stop | None:
        interval = self._cfg.exit_interval
        if interval is None or iteration % interval or iteration in (self._first, self._last):
            return None
        return Stop(reason="interval", detail=f"--exit-interval {interval}")
