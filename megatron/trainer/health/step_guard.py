"""Finds bad steps: losses and gradient norms that are not finite, or spikes."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron.trainer.config.schema import ReliabilityConfig

MIN_HISTORY = 16
"""Steps before spikes are looked for: a deviation of fewer says little."""


class StepGuard:
    """Judges steps by those before; every rank sees the same losses and norms, and agrees.

    A skipped step leaves weights and optimizer unchanged; it is counted, and its samples are not
    read again. Its loss and norm do not enter the history.

    Args:
        cfg: the flags.
    """

    def __init__(self, cfg: ReliabilityConfig) -> None:
        self._cfg = cfg
        self._losses: deque[float] = deque(maxlen=cfg.spike_window)
        self._norms: deque[float] = deque(maxlen=cfg.spike_window)
        self.skipped_in_row = 0
        """Steps skipped since the last that was taken."""
        self.rewinds: dict[int, int] = {}
        """How often the run went back, by iteration of the checkpoint."""

    @property
    def looks_for_spikes(self) -> bool:
        """Return whether finite numbers can be refused."""
        return self._cfg.spike_sigma is not None

    def loss_problem(self, loss: float) -> str | None:
        """Say what is wrong with a step's loss; None if nothing is."""
        return self._problem("loss", loss, self._losses)

    def norm_problem(self, norm: float) -> str | None:
        """Say what is wrong with a step's gradient norm before clipping; None if nothing is."""
        return self._problem("gradient norm", norm, self._norms)

    def took(self, *, loss: float, norm: float) -> None:
        """Count a step that was taken."""
        self._losses.append(loss)
        self._norms.append(norm)
        self.skipped_in_row = 0

    def skip(self) -> bool:
        """Count a step that should be skipped; False if it is one too many."""
        self.skipped_in_row += 1
        return self.skipped_in_row <= self._cfg.max_skipped

    def may_rewind(self, iteration: int) -> bool:
        """Count a rewind to the checkpoint of `iteration`; False if it is one too many."""
        if not self._cfg.rewind_on_spike:
            return False
        count = self.rewinds.get(iteration, 0) + 1
        if count > self._cfg.max_rewinds:
            return False
        self.rewinds[iteration] = count
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain JSON values."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "skipped_in_row": self.skipped_in_row,
            "rewinds": [list(pair) for pair in sorted(self.rewinds.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of another guard; a history longer than this run's window is cut.

        Raises:
            KeyError, TypeError, ValueError: this is not what `state_dict` returns.
        """
        losses, norms = (
            [float(value) for value in state[name]] for name in ("losses", "grad_norms")
        )
        rewinds = {int(iteration): int(count) for iteration, count in state["rewinds"]}
        self.skipped_in_row = int(state["skipped_in_row"])
        self._losses = deque(losses, maxlen=self._cfg.spike_window)
        self._norms = deque(norms, maxlen=self._cfg.spike_window)
        self.rewinds = rewinds

    def _problem(self, name: str, value: float, history: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        sigma = self._cfg.spike_sigma
        if sigma is None or len(history) < min(MIN_HISTORY, self._cfg.spike_window):
            return None
        mean, deviation = statistics.fmean(history), statistics.pstdev(history)
        if value <= mean + sigma * deviation:
            return None
        return (
            f"{name} {value:g} is above {mean:g} + {sigma:g} x {deviation:g}, mean and deviation of"
            f" the last {len(history)} steps"
        )
