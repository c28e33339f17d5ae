"""Trains as `tools/pretrain.py` does, without checkpoints, and writes what it took as JSON.

    python -m benchmarks.pretrain_run --result run.json --preset olmoe_1b_7b --mock-data ...

Takes the flags of `tools/pretrain.py`. Time runs from one record to the next (--log-interval), all
that lies between included; the first interval, in which kernels are compiled, does not count. With
--profile the trainer's profiler runs too, and its trace below SAVE is summed up. Afterwards the
device's ceiling is measured in the same process. `--mock-data` makes random tokens, none twice.
"""

import argparse
import dataclasses
import gc
import gzip
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import GEMM_SIZE
from benchmarks.ceilings import Ceilings
from benchmarks.machine import describe_machine
from benchmarks.memory import resident_bytes
from benchmarks.shapes import causal_flops_per_token
from benchmarks.timing import summarize, synchronize
from benchmarks.trace import sum_up_trace
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.console import Console
from megatron.trainer.hooks.profiler import TRACE_NAME, Profiler
from megatron.trainer.loop import train
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.run_dir import profile_directory
from megatron.trainer.runtime.launch import environment_rank, initialize, run_main, shut_down
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.counting import count_parameters, training_flops_per_token

BYTES_PER_PARAMETER = 18
"""bf16 weights (2), fp32 gradients, master weights and two moments (16)."""
ACTIVATIONS_PER_LAYER = 2.5e9
"""Bytes of OLMoE-1B-7B's layer at 4 x 4096 tokens: 8 layers took 78 GiB on an H200, parameters
included."""
FILLED = 0.85
"""Share of the memory that these may fill: the rest is for CUDA and temporaries."""
CEILING_SAMPLES = 5


class Clock(Hook):
    """Takes the time of each record, when all work of the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moments: list[tuple[int, float]] = []
        """Iteration and seconds."""
        self.losses: list[float] = []

    def on_log(self, record: Record) -> None:
        """Take the time."""
        synchronize(self._device)
        self.moments.append((record["iteration"], time.perf_counter()))
        self.losses.append(record["lm_loss"])

    def step_seconds(self) -> list[float]:
        """Return the seconds of a step, of each interval but the first."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [(end - start) / (last - first) for (first, start), (last, end) in pairs]


@hide_upstream_warnings()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe in `argv`; return the exit status."""
    args, flags = new_parser().parse_known_args(argv)
    return run_main(lambda: _run(args, flags))


def new_parser() -> argparse.ArgumentParser:
    """Build the parser of this program's own flags."""
    parser = argparse.ArgumentParser(
        prog="pretrain_run", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--result", type=Path, required=True, metavar="FILE", help="to write")
    parser.add_argument(
        "--fit-layers", type=int, metavar="N", help="N layers, or as many as fit the GPU's memory"
    )
    parser.add_argument("--gemm-size", type=int, metavar="N", help="of the ceiling")
    return parser


def _run(args: argparse.Namespace, flags: list[str]) -> int:
    configure_logging(environment_rank())
    machine = describe_machine()  # before torch.cuda is replaced on a CPU
    cfg = parse_recipe(flags, prog="pretrain_run", description="")
    if args.fit_layers is not None:
        cfg = with_layers(cfg, args.fit_layers, gpu_bytes())
    found, device = measure(cfg)
    # What training held is garbage now, but some in cycles.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    ceilings = Ceilings(device, torch.bfloat16, args.gemm_size or GEMM_SIZE[device.type])
    rates = [ceilings.sample(n)["flops_per_second"] for n in range(CEILING_SAMPLES)]
    found["gemm_flops_per_second"] = dataclasses.asdict(summarize(rates))
    found["machine"] = machine
    args.result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    shut_down()
    return 0


def measure(cfg: PretrainConfig) -> tuple[dict[str, Any], torch.device]:
    """Train; return what was measured, and the device."""
    ctx = initialize(cfg)
    state = build_state(cfg, ctx)
    clock = Clock(ctx.device)
    hooks: list[Hook] = [Console(progress=False), clock]
    directory = profile_directory(Path(cfg.checkpoint.save or "."), rank=0)
    if cfg.profiling.profile:
        hooks.append(Profiler(cfg.profiling, directory, rank=0))
    train(state, NEXT_TOKEN, hooks=hooks)
    tokens = cfg.training.global_batch_size * cfg.training.seq_length
    found: dict[str, Any] = {
        "num_layers": cfg.model.num_layers,
        "parameters": count_parameters(cfg.model).total,
        "tokens_per_step": tokens,
        "step_seconds": clock.step_seconds(),
        "losses": clock.losses,
        "model_flops_per_token": training_flops_per_token(cfg.model, cfg.training.seq_length),
        "causal_flops_per_token": causal_flops_per_token(cfg.model, cfg.training.seq_length),
        "peak_bytes": peak_bytes(ctx.device),
    }
    if cfg.profiling.profile:
        steps = cfg.profiling.profile_step_end - cfg.profiling.profile_step_start
        with gzip.open(directory / TRACE_NAME, "rt", encoding="utf-8") as file:
            found["profile"] = sum_up_trace(json.load(file)["traceEvents"], num_steps=steps)
    return found, ctx.device


def gpu_bytes() -> int | None:
    """Return the memory of the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def peak_bytes(device: torch.device) -> int:
    """Return the peak of what was allocated on a GPU, or of this process's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resident_bytes("VmHWM")


def with_layers(cfg: PretrainConfig, most: int, memory: int | None) -> PretrainConfig:
    """Set the number of layers: `most`, or as many as fit.

    Args:
        cfg: of a run at OLMoE-1B-7B's sizes.
        most: layers.
        memory: bytes of the GPU; None is no limit.
    """

    def needed(layers: int) -> float:
        parameters = count_parameters(dataclasses.replace(cfg.model, num_layers=layers)).total
        return parameters * BYTES_PER_PARAMETER + layers * ACTIVATIONS_PER_LAYER

    fitting = most
    while memory is not None and fitting > 1 and needed(fitting) > FILLED * memory:
        fitting -= 1
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=fitting))


if __name__ == "__main__":
    sys.exit(main())
