"""What watches a run without changing it: records, TensorBoard, wandb, the progress bar.

A hook is handed to the ranks it should run on; writers go to rank 0 alone and therefore never call
a collective.
"""

import logging
import math
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.bounded_read import read_small
from megatron.trainer.records.jsonl import Record, append_record, keep_records_until, scalars

logger = logging.getLogger(__name__)

_NOTABLE_RATIO = 1.1
"""A rank this much busier than the median is told of on the console."""


class Hook:
    """Watches a run without changing it; a subclass overrides the moments that it needs."""

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Training begins after `iteration` steps."""

    def on_stage(self, stage: str, iteration: int) -> None:
        """A stage of step `iteration` begins: `step`, `save`, or `evaluation` for each batch."""

    def on_step(self, iteration: int, lm_loss: float) -> None:
        """Step `iteration` is done."""

    def on_log(self, record: Record) -> None:
        """A step's record is complete; every log_interval steps."""

    def on_evaluation(self, record: Record) -> None:
        """The validation sets were evaluated."""

    def on_save(self, iteration: int, seconds: float) -> None:
        """A checkpoint of `iteration` steps was written, in so many seconds."""

    def on_rewind(self, iteration: int) -> None:
        """The run has gone back to `iteration` steps, and will take the later ones again."""

    def on_event(self, iteration: int, name: str, detail: str, **more: Any) -> None:
        """Something happened that a reader of the run should know: `skip`, `phase`, `rewind`.

        Args:
            iteration: steps done.
            name: of the event, as docs/run_directory.md lists them.
            detail: one sentence.
            more: further JSON values.
        """

    def on_end(self) -> None:
        """Training is over, or failed."""


class MetricsFile(Hook):
    """`metrics.jsonl`: one JSON object a record, the source of truth for every plot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        keep_records_until(self.path, iteration)

    def on_rewind(self, iteration: int) -> None:
        """Drop records of steps that are taken again."""
        keep_records_until(self.path, iteration)

    def on_log(self, record: Record) -> None:
        """Append the record."""
        append_record(self.path, record)

    def on_evaluation(self, record: Record) -> None:
        """Append the record."""
        append_record(self.path, record)


class TensorBoard(Hook):
    """Event files for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Open the file; steps that a resumed run will take again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=iteration + 1)

    def on_rewind(self, iteration: int) -> None:
        """Begin another file, which hides the steps that are taken again."""
        self.on_end()
        self.on_start(iteration, 0)

    def on_log(self, record: Record) -> None:
        """Write every number of the record."""
        for name, value in scalars(record).items():
            if name != "iteration":
                self._writer.add_scalar(name, value, record["iteration"])

    on_evaluation = on_log

    def on_end(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Hook):
    """A wandb run; its id is kept in the run directory, so a resumed run continues it.

    wandb takes no number for a step that it has passed: after a rewind it shows the old ones until
    the run is beyond them.
    """

    def __init__(self, cfg: LoggingConfig, run_directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb_project is {cfg.wandb_project!r}, but wandb is not installed; install the"
                " extra: pip install -e '.[wandb]', or leave --wandb-project away"
            ) from error
        run_id = _kept_id(run_directory / "wandb_run_id")
        try:
            self._run = wandb.init(
                project=cfg.wandb_project,
                name=cfg.wandb_name,
                id=run_id,
                resume="allow",
                dir=str(run_directory),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb did not start: {error}; log in, set WANDB_MODE=offline, or leave"
                " --wandb-project away"
            ) from error

    def on_log(self, record: Record) -> None:
        """Log every number of the record at its iteration."""
        self._run.log(scalars(record), step=record["iteration"])

    on_evaluation = on_log

    def on_end(self) -> None:
        """Close the run."""
        self._run.finish()


def _kept_id(path: Path) -> str:
    """The wandb id that is kept in a file, made when there is none.

    Raises:
        ConfigError: it is none; wandb makes names of files and addresses of it.
    """
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    try:
        text = read_small(path, most_bytes=200).decode("ascii", errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; remove it") from error
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise ConfigError(
            f"{path} holds {text!r}; an id is made of letters, digits, _ and -; remove the file to"
            " begin another wandb run"
        )
    return text


class Console(Hook):
    """A progress bar on a terminal, a line per record anywhere else."""

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

    def on_step(self, iteration: int, lm_loss: float) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, loss=f"{lm_loss:.4f}")

    def on_log(self, record: Record) -> None:
        """Show the speed, or the whole line."""
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, speed=speed)
            return
        norm = record["grad_norm"]  # NaN where a step was skipped for its loss
        parts = [
            f"iteration {record['iteration']}/{self._train_iters}",
            f"loss {record['lm_loss']:.4f}",
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
        """Say every validation loss."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in record["valid_loss"].items())
        logger.info("iteration %d | validation loss: %s", record["iteration"], losses)

    def on_end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
