"""Makes a file of a GPU's rates for the planner, from what the benchmarks measured on it.

    python -m benchmarks.moe_layer --shape olmoe --dtype bf16 --device cuda --json l
    python -m benchmarks.train_step --shape olmoe --num-layers 2 --dtype bf16 --device cuda --json s
    python -m benchmarks.calibrate --layer l --step s --out mine.json
    python tools/plan.py --config run.yaml --gpus 64 --gpu mine.json

The layer gives the time of each backend, the ceilings of its rounds the rates of a product and of
memory; what the step takes beside everything that is predicted of it are the GPU's waits. Neither
tells products of experts and attention apart from the rest: their shares of a large product's rate
are those of the base.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, Shape, resize
from megatron.trainer.config.parallel_layout import resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from moe_ext.cost.cluster import Cluster, step_seconds
from moe_ext.cost.device import DEVICES, TOKENS, Device
from moe_ext.cost.rank import Batch

_NAMES = {"megablocks-grouped": "megablocks", "te-grouped": "te"}
"""Peers that are backends of a run, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file that `argv` describes; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="calibrate", description="Make a file of a GPU's rates for tools/plan.py."
    )
    parser.add_argument("--layer", metavar="FILE", required=True, help="moe_layer --json")
    parser.add_argument("--step", metavar="FILE", required=True, help="train_step --json")
    parser.add_argument("--base", choices=sorted(DEVICES), default="h200", help="(%(default)s)")
    parser.add_argument("--out", metavar="FILE", required=True, help="gets the rates")
    args = parser.parse_args(argv)
    try:
        found = calibrate(
            json.loads(Path(args.layer).read_text(encoding="utf-8")),
            json.loads(Path(args.step).read_text(encoding="utf-8")),
            base=DEVICES[args.base],
        )
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"cannot calibrate with --layer {args.layer} --step {args.step}: {error!r}")
    Path(args.out).write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", "utf-8")
    return 0


def calibrate(layer: Mapping[str, Any], step: Mapping[str, Any], *, base: Device) -> Device:
    """Return the rates that the measurements imply.

    Args:
        layer: what `benchmarks.moe_layer` wrote, of OLMoE-1B-7B's layer.
        step: what `benchmarks.train_step` wrote, of the same shape with any number of layers.
        base: gives the shares that cannot be measured so.

    Raises:
        ValueError: the measurements are not of that shape in bf16 on a GPU.
    """
    for found in (layer, step):
        _check(found)
    if layer["tokens_per_sample"] != TOKENS:
        raise ValueError(f"the layer had {layer['tokens_per_sample']} tokens; measure {TOKENS}")
    gemm = layer["ceilings"]["gemm_flops_per_second"]["median"] / 1e12
    device = dataclasses.replace(
        base,
        name=layer["machine"]["gpu"],
        source=f"benchmarks.calibrate: measured {layer['machine']['date']}, base {base.name}",
        memory_gb=layer["machine"]["gpu_memory_bytes"] / 1e9,
        gemm_tflops=gemm,
        expert_tflops=base.expert_tflops * gemm / base.gemm_tflops,
        attention_tflops=base.attention_tflops * gemm / base.gemm_tflops,
        memory_gbps=layer["ceilings"]["copy_bytes_per_second"]["median"] / 1e9,
        waits_ms=0.0,
        layer_ms=_milliseconds(layer),
    )
    measured = _milliseconds(step)
    left = [took - predict_ms(_shape(step), name, device) for name, took in measured.items()]
    return dataclasses.replace(device, waits_ms=max(0.0, sorted(left)[len(left) // 2]))


def predict_ms(shape: Shape, backend: str, device: Device) -> float:
    """Return the predicted milliseconds of a step of one micro-batch on one GPU."""
    seconds = step_seconds(
        dataclasses.replace(shape.model, expert_backend=backend),
        resolve_layout(ParallelConfig(), 1),
        Batch(
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            num_microbatches=1,
        ),
        Cluster(device=device, intra_bytes_per_second=1e9, inter_bytes_per_second=1e9),
    )
    return 1e3 * sum(seconds.values())


def _shape(found: Mapping[str, Any]) -> Shape:
    arguments = found["arguments"]
    names = ("num_layers", "seq_length", "micro_batch_size")
    return resize(SHAPES[arguments["shape"]], **{name: arguments[name] for name in names})


def _check(found: Mapping[str, Any]) -> None:
    arguments = found["arguments"]
    for name, value in (("shape", "olmoe"), ("device", "cuda"), ("dtype", "bf16")):
        if arguments[name] != value:
            raise ValueError(f"--{name} was {arguments[name]}; measure with {value}")


def _milliseconds(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the median of each implementation that is a backend of a run, by its name."""
    times = {}
    for name, row in found["implementations"].items():
        first, _, backend = name.partition(":")
        if first == "native":
            backend = backend or found["native_backend"]
        elif (backend := _NAMES.get(name, "")) == "":
            continue
        if row["status"] == "measured":
            times[backend] = row["milliseconds"]["median"]
    if not times:
        raise ValueError("no backend of a run was measured; leave out --only, or name native")
    return times


if __name__ == "__main__":
    import sys

    sys.exit(main())
