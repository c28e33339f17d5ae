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

    Several ranks have to agree, for a signal may reach one later than others. A step carries
    what each has noticed along with its loss, so that the host does not wait for the device a
    second time; after an evaluation or a save the ranks are asked anew.

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
        self._has_heard = False
        self.stop: Stop | None = None
        """The decision; None to go on."""

    def notice(self) -> int:
        """Return what this rank has noticed, for `train_step`; the largest of all ranks decides.

        Twice the number of the signal received, and 1 more if the time is over; 0 for neither.
        """
        received = signals.received()
        limit = self._cfg.exit_duration_in_mins
        minutes = (time.monotonic() - signals.STARTED) / 60
        is_over = limit is not None and minutes >= limit
        return 2 * int(received or 0) + int(is_over)

    def hear(self, notice: int) -> None:
        """Decide by the largest notice of all ranks, so that the next check asks none of them."""
        self._has_heard = True
        if self.stop is None:
            self.stop = self._reason(notice)

    def forget(self) -> None:
        """Let the next check ask all ranks: what took long has passed since they were heard."""
        self._has_heard = False

    def check(self, iteration: int, *, is_evaluating: bool = False) -> Stop | None:
        """Return why to stop, or None; the first reason stays. A collective call.

        Args:
            iteration: steps done.
            is_evaluating: an evaluation is going on, which no interval cuts short.
        """
        if self.stop is None and not self._has_heard:
            self.stop = self._reason(self._largest(self.notice()))
        self._has_heard = False
        if self.stop is None and not is_evaluating:
            self.stop = self._at_interval(iteration)
        return self.stop

    def _largest(self, notice: int) -> int:
        """Return the largest notice of all ranks; the host waits, if there are others."""
        if dist.get_world_size() == 1:
            return notice
        noted = torch.full((), notice, dtype=torch.int64, device=self._device)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return int(noted.item())

    def _reason(self, notice: int) -> Stop | None:
        number, is_over = divmod(notice, 2)
        if number:
            return Stop(reason="signal", detail=f"{signal.Signals(number).name} received")
        if is_over:
            limit = self._cfg.exit_duration_in_mins
            return Stop(reason="duration", detail=f"--exit-duration-in-mins {limit:g} are over")
        return None

    def _at_interval(self, iteration: int) -> Stop | None:
        interval = self._cfg.exit_interval
        if interval is None or iteration % interval or iteration in (self._first, self._last):
            return None
        return Stop(reason="interval", detail=f"--exit-interval {interval}")
