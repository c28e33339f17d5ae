"""Prints a run's progress."""

import logging
import math
import sys
from typing import Any

from megatron.trainer.hooks.base import Hook
from megatron.trainer.records.losses import loss_name
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.tasks import describe_tasks

logger = logging.getLogger(__name__)

_NOTABLE_RATIO = 1.1
"""A rank this much busier than the median is named on the console."""


class Console(Hook):
    """Shows a progress bar on a terminal, a line per record anywhere else."""

    def __init__(self, *, progress: bool) -> None:
        self._use_bar = progress and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._train_iters = 0

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Open the bar."""
        self._train_iters = train_iters
        if self._use_bar:
            from rich.console import Console as RichConsole
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self._task = self._bar.add_task(
                "training", total=train_iters, completed=iteration, loss="-", speed=""
            )
            self._bar.start()

    def on_step(self, iteration: int, loss: float) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, loss=f"{loss:.4f}")

    def on_log(self, record: Record) -> None:
        """Update the speed, or log a line."""
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, speed=speed)
            return
        loss = record[loss_name(record) or "lm_loss"]
        norm = record["grad_norm"]  # NaN where a step was skipped for its loss
        parts = [
            f"iteration {record['iteration']}/{self._train_iters}",
            f"loss {loss:.4f}",
            "grad norm " + (f"{norm:.3f}" if math.isfinite(norm) else "-"),
            f"lr {record['learning_rate']:.3e}",
            speed,
        ]
        if "load_balancing_loss" in record:
            parts.insert(2, f"balance {record['load_balancing_loss']:.3f}")
            parts.insert(3, f"z {record['z_loss']:.2f}")
        ratio = record.get("straggler_ratio", 1.0)
        if ratio >= _NOTABLE_RATIO:
            parts.append(f"slowest rank {record['straggler_rank']} ({ratio:.2f} x median)")
        logger.info(" | ".join(parts))

    def on_evaluation(self, record: Record) -> None:
        """Log every validation loss, and the tasks' scores."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in record["valid_loss"].items())
        if losses:
            logger.info("iteration %d | validation loss: %s", record["iteration"], losses)
        tasks = describe_tasks(record)
        if tasks:
            seconds = f"{record['task_seconds']:.1f} s"
            logger.info("iteration %d | tasks: %s, in %s", record["iteration"], tasks, seconds)

    def on_end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
