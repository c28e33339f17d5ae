"""Writes a run's records: as JSON lines, to TensorBoard, to Weights & Biases."""

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks.base import Hook
from megatron.trainer.io.bounded_read import read_small
from megatron.trainer.records.record_file import (
    Record,
    append_record,
    keep_records_until,
    scalars,
)


class MetricsFile(Hook):
    """Writes `metrics.jsonl`: one JSON object a record, the source of truth for every plot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Drop records of steps that a resumed run will repeat."""
        keep_records_until(self.path, iteration)

    def on_rewind(self, iteration: int) -> None:
        """Drop records of steps that will be repeated."""
        keep_records_until(self.path, iteration)

    def on_log(self, record: Record) -> None:
        """Append the record."""
        append_record(self.path, record)

    def on_evaluation(self, record: Record) -> None:
        """Append the record."""
        append_record(self.path, record)


class TensorBoard(Hook):
    """Writes event files for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Open the file; steps that a resumed run will repeat are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=iteration + 1)

    def on_rewind(self, iteration: int) -> None:
        """Begin another file, which hides the steps that will be repeated."""
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
    """Logs to a wandb run; its id is kept in the run directory, so a resumed run continues it.

    wandb takes no number for an earlier step: after a rewind it shows the old ones until the run is
    beyond them.
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
    """Read the wandb id in a file; make one if there is no file.

    Raises:
        ConfigError: it is not an id; wandb builds file names and addresses from it.
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
