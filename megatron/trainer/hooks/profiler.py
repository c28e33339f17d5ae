"""Profiles a few steps with torch.profiler."""

import gzip
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.trainer.config.schema import ProfilingConfig
from megatron.trainer.hooks.base import Hook
from megatron.trainer.io.atomic_write import write_bytes, write_text

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
HOST = {"cpu_op", "cuda_runtime", "cuda_driver"}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


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

    def on_step(self, iteration: int, loss: float) -> None:
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
        head = (
            f"iterations {self._steps[0]} to {self._steps[-1]} on rank {self._rank},"
            f" {seconds:.3f} s"
        )
        try:
            self._write_files(found, head)
        except OSError as error:  # a run must not end because its profile finds no room
            logger.warning("the profile cannot be written to %s: %s", self._directory, error)
            return
        # Ranks other than 0 log warnings only.
        level = logging.INFO if self._rank == 0 else logging.WARNING
        logger.log(level, "profiled %s: %s", head, self._directory)

    def _write_files(self, found: profile, head: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        events = _write_trace(found, self._directory / TRACE_NAME)
        lines = describe_operations(events, num_steps=len(self._steps))
        text = "".join(f"{line}\n" for line in (head, *lines))
        write_text(self._directory / TABLE_NAME, text)


def _write_trace(found: profile, path: Path) -> list[dict[str, Any]]:
    """Write a compressed trace; return its events."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        # Compressed here: torch compresses line by line, which takes longer than all the rest.
        plain = Path(scratch) / "trace.json"
        found.export_chrome_trace(str(plain))
        text = plain.read_bytes()
    write_bytes(path, gzip.compress(text, compresslevel=5))
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


@dataclass
class Operation:
    """Sums up the calls of one operation."""

    calls: int = 0
    own_us: float = 0.0
    """Microseconds, without operations that it calls."""


def describe_operations(events: Sequence[Mapping[str, Any]], *, num_steps: int) -> list[str]:
    """Count the host's synchronisations and list the longest operations.

    Args:
        events: those of a Chrome trace, as torch.profiler exports it.
        num_steps: steps in the trace.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    host = sum_up([event for event in timed if event.get("cat") in HOST])
    device = sum_up([event for event in timed if event.get("cat") in DEVICE])
    names = DEVICE_WAITS if device else (HOST_READ,)
    total = sum(host[name].calls for name in names if name in host)
    lines = [f"host synchronisations: {total}, {total / num_steps:g} a step"]
    found = [name for name in (*DEVICE_WAITS, HOST_READ) if name in host]
    lines += [f"  {host[name].calls:6d} {name}" for name in found]
    if device:
        lines += ["", f"on the GPU, the {NUM_OPERATIONS} longest:", *_table(device)]
    return [*lines, "", f"on the host, the {NUM_OPERATIONS} longest:", *_table(host)]


def sum_up(events: list[Mapping[str, Any]]) -> dict[str, Operation]:
    """Sum up operations by name; an event within another one of its thread is its child."""
    found: dict[str, Operation] = {}
    parents: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        operation = found.setdefault(event["name"], Operation())
        operation.calls += 1
        operation.own_us += event["dur"]
        stack = parents.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            found[stack[-1]["name"]].own_us -= event["dur"]
        stack.append(event)
    return found


def _table(operations: Mapping[str, Operation]) -> list[str]:
    longest = sorted(operations.items(), key=lambda item: -item[1].own_us)[:NUM_OPERATIONS]
    whole_us = sum(operation.own_us for operation in operations.values())
    lines = [f"{'self ms':>12} {'share':>7} {'calls':>9} {'self us/call':>13}  operation"]
    lines += [
        f"{each.own_us / 1e3:12.3f} {each.own_us / whole_us:7.1%} {each.calls:9d}"
        f" {each.own_us / each.calls:13.1f}  {name:.120}"
        for name, each in longest
    ]
    return lines
