"""Defines hooks of a pretraining run, and builds all those of a rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.config.cli import dump_config, flatten
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.console import Console
from megatron.trainer.hooks.plots import RunPlots, plot_expert_load
from megatron.trainer.hooks.profiler import Profiler
from megatron.trainer.hooks.writers import MetricsFile, TensorBoard, WeightsAndBiases
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.record_file import Record, append_record, keep_records_until
from megatron.trainer.records.run_dir import CONFIG_NAME, LOAD_NAME, METRICS_NAME, profile_directory
from megatron.trainer.state import TrainState
from moe_app.pretrain.config import PretrainConfig
from moe_ext.metrics import MOA, MOE, RouterMetrics, RouterReport

_LOAD_NAMES = {MOE: "load", MOA: "moa_load"}
_EXPERT_NAMES = {MOE: "expert", MOA: "attention expert"}


class RouterHealth:
    """Adapts router metrics to the training loop; keeps the last reports for the plots.

    Args:
        metrics: by kind of router, the same kinds on every rank.
    """

    def __init__(self, metrics: Mapping[str, RouterMetrics]) -> None:
        self._metrics = metrics
        self.last: dict[str, RouterReport] = {}

    def reset(self) -> None:
        """Forget what was measured."""
        for metrics in self._metrics.values():
            metrics.reset()

    def reduce(self) -> Mapping[str, Any]:
        """Return summaries and per-layer lists over all ranks; a collective call."""
        self.last = {kind: metrics.reduce() for kind, metrics in self._metrics.items()}
        record: dict[str, Any] = {}
        for kind, report in self.last.items():
            record |= report.as_dict(kind) | report.layers_as_dict(kind)
        return record


class ExpertLoad(Hook):
    """Writes every expert's load beside the metrics, and draws the last ones as heat maps."""

    def __init__(self, health: RouterHealth, run_directory: Path) -> None:
        self._health = health
        self._file = run_directory / LOAD_NAME
        self._plots = run_directory / "plots"
        self._iteration = 0

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        keep_records_until(self._file, iteration)

    def on_rewind(self, iteration: int) -> None:
        """Drop records of steps that are taken again."""
        keep_records_until(self._file, iteration)

    def on_log(self, record: Record) -> None:
        """Append [layers][experts] loads of each kind of router, 1 = even share."""
        if self._health.last:
            self._iteration = record["iteration"]
            loads = {
                _LOAD_NAMES[kind]: [[round(x, 4) for x in row] for row in report.load.tolist()]
                for kind, report in self._health.last.items()
            }
            append_record(self._file, {"iteration": self._iteration, **loads})

    def on_end(self) -> None:
        """Draw the heat maps."""
        for kind, report in self._health.last.items():
            plot_expert_load(
                report.load.tolist(),
                self._plots / f"expert_{_LOAD_NAMES[kind]}.png",
                title=f"{_EXPERT_NAMES[kind]} load, global batch of iteration {self._iteration}",
            )


def build_hooks(cfg: PretrainConfig, state: TrainState) -> list[Hook]:
    """Build this rank's hooks: a profiler on the profiled ranks, all others on rank 0."""
    rank, save = state.ctx.rank, cfg.checkpoint.save
    hooks: list[Hook] = []
    if cfg.profiling.profile and rank in cfg.profiling.profile_ranks and save is not None:
        hooks.append(Profiler(cfg.profiling, profile_directory(Path(save), rank), rank=rank))
    return hooks + _writers(cfg, state) if rank == 0 else hooks


def _writers(cfg: PretrainConfig, state: TrainState) -> list[Hook]:
    """Build what shows and writes the run's records."""
    hooks: list[Hook] = [Console(progress=cfg.logging.progress)]
    if cfg.checkpoint.save is None:
        return hooks
    directory = Path(cfg.checkpoint.save)
    write_text(directory / CONFIG_NAME, dump_config(cfg))
    hooks.append(MetricsFile(directory / METRICS_NAME))
    if cfg.logging.tensorboard:
        hooks.append(TensorBoard(directory / "tensorboard"))
    if cfg.logging.wandb_project is not None:
        hooks.append(WeightsAndBiases(cfg.logging, directory, flatten(cfg)))
    if isinstance(state.metrics, RouterHealth):
        hooks.append(ExpertLoad(state.metrics, directory))
    hooks.append(RunPlots(directory / METRICS_NAME, directory / "plots"))
    return hooks
