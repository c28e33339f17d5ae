"""Profiles a few steps with torch.profiler."""

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.trainer.config.schema import ProfilingConfig
from megatron.trainer.hooks.base import Hook

logger = logging.getLogger(__name__)

TRACE_NAME = "trace.json.gz"
TABLE_NAME = "operations.txt"
NUM_OPERATIONS = 30
"""Operations in the table."""
HOST_READ = "aten::_local_scalar_dense"
"""Reads one number of a tensor; `Tensor.item`, `bool(tensor)` and the like all do."""
DEVICE_WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
"""Calls in which the host waits for the GPU."""


class Profiler(Hook):
    """Profiles the steps after `profile_step_start`, up to and with `profile_step_end`.

    Writes a trace for chrome://tracing or ui.perfetto.dev, and a table of the longest operations
    that begins with the host's synchronisations. What comes between the steps (an evaluation, a
    save) is in the trace under its own name.

    Args:
        cfg: which steps.
        directory: where to write; it is made.
        rank: this rank.
    """

    def __init__(self, cfg: ProfilingConfig, directory: Path, *, rank: int) -> None:
        self._cfg = cfg
        self._directory = directory
        self._rank = rank
        self._profile: profile | None = None
        self._is_done = False
        self._stage: record_function | None = None
        self._steps: list[int] = []
        self._started = 0.0

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Warn when the steps are past."""
        if iteration >= self._cfg.profile_step_end:
            logger.warning(
                "nothing is profiled: the run stands at iteration %d, --profile-step-end is %d",
                iteration,
                self._cfg.profile_step_end,
            )

    def on_stage(self, stage: str, iteration: int) -> None:
        """Start before the first step; name what comes in the trace."""
        start, end = self._cfg.profile_step_start, self._cfg.profile_step_end
        if stage == "step" and start < iteration <= end and not self._is_done:
            if self._profile is None:
                self._start()
            self._steps.append(iteration)
        if self._profile is not None:
            self._end_stage()
            self._stage = record_function(f"{stage} {iteration}")
            self._stage.__enter__()

    def on_step(self, iteration: int, lm_loss: float) -> None:
        """Stop after the last step, and write."""
        if self._profile is not None:
            self._end_stage()
            if iteration >= self._cfg.profile_step_end:
                self._write()

    def on_end(self) -> None:
        """Write what there is of a run that ended before the last step."""
        if self._profile is not None:
            self._end_stage()
            self._write()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()
        self._started = time.perf_counter()

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._stage.__exit__(None, None, None)
            self._stage = None

    def _write(self) -> None:
        assert self._profile is not None
        found, self._profile, self._is_done = self._profile, None, True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        found.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._directory / TRACE_NAME))
        head = (
            f"iterations {self._steps[0]} to {self._steps[-1]} on rank {self._rank},"
            f" {seconds:.3f} s"
        )
        text = describe_operations(found.key_averages(), num_steps=len(self._steps))
        (self._directory / TABLE_NAME).write_text(f"{head}\n{text}", encoding="utf-8")
        # Ranks other than 0 log warnings only.
        level = logging.INFO if self._rank == 0 else logging.WARNING
        logger.log(level, "profiled %s: %s", head, self._directory)


def describe_operations(averages: Any, *, num_steps: int) -> str:
    """Count the host's synchronisations and list the longest operations.

    Args:
        averages: what `profile.key_averages` returns.
        num_steps: steps in the profile.
    """
    counts = Counter({event.key: event.count for event in averages})
    is_on_gpu = any(event.self_device_time_total > 0 for event in averages)
    names = DEVICE_WAITS if is_on_gpu else (HOST_READ,)
    total = sum(counts[name] for name in names)
    lines = [f"host synchronisations: {total}, {total / num_steps:g} a step"]
    lines += [f"  {counts[name]:6d} {name}" for name in (*DEVICE_WAITS, HOST_READ) if counts[name]]
    key = "self_device_time_total" if is_on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=NUM_OPERATIONS, max_name_column_width=80)
    return "\n".join([*lines, "", table])
