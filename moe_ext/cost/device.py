"""Describe how fast a GPU computes, by what was measured on one.

`DEVICES` has those that are known; a file of one's own has the same fields. Rates are those of
large products in bf16: `compute` says how far smaller ones stay below them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 16384, 2048, 1024, 64, 8
"""The layer that `Device.layer_ms` is of: OLMoE-1B-7B's, with a micro-batch of 4 x 4,096 tokens."""
LAYER_FLOPS = 18.0 * HIDDEN * FFN * TOPK * TOKENS
"""Its model FLOPs, forward and backward."""
AUTO, UNMEASURED = "auto", "grouped"
"""The configuration's name for a backend that is chosen, and the backend that others count as."""
_OF_AUTO = ("triton", "grouped")
"""Backends among which `auto` takes the fastest."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Holds the rates of a GPU."""

    name: str
    """Of the GPU."""
    source: str
    """Where the figures are from."""
    memory_gb: float
    """Its memory in GB (10^9 bytes)."""
    gemm_tflops: float
    """TFLOP/s of a large dense product."""
    expert_tflops: float
    """The same of the products alone in a layer of experts."""
    attention_tflops: float
    """The same of causal attention, counted over the full square as in `moe_ext.counting`."""
    memory_gbps: float
    """GB/s that passes over memory reach, reads and writes together."""
    waits_ms: float
    """Of a step, in which the GPU waits for the host."""
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    """Of a layer of experts, forward and backward, by backend; the layer is that of `TOKENS`."""
    half_tile: float = 64.0
    """Half a tile of a product: what a dimension loses to its last one."""

    def backend(self, name: str) -> str:
        """Return the measured backend that a configured one counts as."""
        if name == AUTO:
            known = [each for each in _OF_AUTO if each in self.layer_ms]
            return min(known, key=lambda each: self.layer_ms[each]) if known else UNMEASURED
        return name if name in self.layer_ms else UNMEASURED

    def expert_rate(self, backend: str) -> float:
        """Return the FLOP/s of a backend's products at the measured shape."""
        rate = self.expert_tflops * 1e12
        if backend not in self.layer_ms:
            return rate
        return max(rate, LAYER_FLOPS / (self.layer_ms[backend] / 1e3))

    def expert_passes(self, backend: str) -> float:
        """Return how often a backend moves a row's elements, beside the products.

        The elements are those of `row_elements`; it is what is left of the measured time.
        """
        if backend not in self.layer_ms:
            return 0.0
        left = self.layer_ms[backend] / 1e3 - LAYER_FLOPS / self.expert_rate(backend)
        moved = TOKENS * TOPK * row_elements(HIDDEN, FFN) * 2.0
        return left * self.memory_gbps * 1e9 / moved

    def utilization(self, *sizes: float) -> float:
        """Return the share of a large product's rate that one of these dimensions reaches."""
        return math.prod(size / (size + self.half_tile) for size in sizes)


def row_elements(hidden: int, ffn: float) -> float:
    """Return the elements of a row's input, output, projections and activation."""
    return 2 * hidden + 3 * ffn


H200 = Device(
    name="NVIDIA H200",
    source=(
        "measured 2026-11-27, torch 2.11, Triton 3.6, bf16: layer of experts and step of"
        " benchmarks.moe_layer and train_step, profile of tools/pretrain.py (docs/performance.md)"
    ),
    memory_gb=141.0,
    gemm_tflops=780.0,
    # 14.2 ms of grouped products in the two layers of a profiled step.
    expert_tflops=2 * LAYER_FLOPS / 14.2e-3 / 1e12,
    # 3.5 ms of two layers: 12 x 2,048 x 4,096 FLOPs a token and layer.
    attention_tflops=2 * 12 * HIDDEN * 4096 * TOKENS / 3.5e-3 / 1e12,
    # AdamW: 28 bytes for each of 1.045 billion parameters in 8.4 ms.
    memory_gbps=28 * 1.0452 / 8.4e-3,
    # What whole steps take beside all else; the profile counts 26 ms of the host's waits.
    waits_ms=15.0,
    layer_ms={"triton": 11.8, "megablocks": 13.3, "grouped": 17.4},
)
"""The one GPU that this code was timed on."""


def with_memory(device: Device, *, ratio: float, **changes: Any) -> Device:
    """Return the same chip with memory of `ratio` times the rate: passes scale, products do not."""
    products = LAYER_FLOPS / (device.expert_tflops * 1e12) * 1e3
    return dataclasses.replace(
        device,
        memory_gbps=device.memory_gbps * ratio,
        layer_ms={
            name: products + max(0.0, each - products) / ratio
            for name, each in device.layer_ms.items()
        },
        **changes,
    )


DEVICES: Mapping[str, Device] = {
    "h100": with_memory(
        H200,
        ratio=3.35 / 4.8,
        name="NVIDIA H100 SXM",
        source=(
            "not measured: the H200's chip, so its products; passes over memory by 3.35 of 4.8 TB/s"
        ),
        memory_gb=80.0,
    ),
    "h200": H200,
}
"""GPUs by the name that `--gpu` takes."""


def flat(tflops: float) -> Device:
    """Return a GPU that makes every product at one rate and takes no time for anything else."""
    return Device(
        name=f"{tflops:g} TFLOP/s in every product",
        source="given as one rate, with nothing but products",
        memory_gb=80.0,
        gemm_tflops=tflops,
        expert_tflops=tflops,
        attention_tflops=tflops,
        memory_gbps=math.inf,
        waits_ms=0.0,
        half_tile=0.0,
    )


def find_device(name: str) -> Device:
    """Return a known GPU, or the one that a file describes.

    Raises:
        ValueError: neither; the message says what to do.
    """
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"gpu '{name}' is neither a known GPU nor a file; use {' or '.join(DEVICES)}, or a"
            " file that python -m benchmarks.calibrate has written"
        )
    try:
        return read_device(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"gpu file {name} cannot be read: {error}; give one that python -m"
            " benchmarks.calibrate has written"
        ) from error
    except ValueError as error:
        raise ValueError(f"gpu file {name}: {error}") from error


def read_device(found: object) -> Device:
    """Check the fields of a file and build its GPU.

    Raises:
        ValueError: a field is missing, unknown or not what it must be.
    """
    fields = {each.name for each in dataclasses.fields(Device)}
    if not isinstance(found, dict):
        raise ValueError(f"must be one JSON object with the fields {', '.join(sorted(fields))}")
    unknown = sorted(found.keys() - fields)
    missing = sorted(fields - _OPTIONAL - found.keys())
    if unknown or missing:
        raise ValueError(
            f"has unknown fields {unknown} and lacks {missing}; a GPU has"
            f" {', '.join(sorted(fields))}"
        )
    layer = found.get("layer_ms", {})
    if not isinstance(layer, dict):
        raise ValueError(f"layer_ms ({layer!r}) must map backends to milliseconds; write an object")
    for key in _TEXTS:
        if not isinstance(found[key], str):
            raise ValueError(f"{key} ({found[key]!r}) must be text; write a string")
    rates = {key: found[key] for key in found.keys() - _TEXTS - {"layer_ms"}}
    for key, value in {**rates, **{f"layer_ms of {key}": layer[key] for key in layer}}.items():
        if not _is_rate(value, may_be_zero=key in _MAY_BE_ZERO):
            raise ValueError(f"{key} ({value!r}) must be a number above 0; write what was measured")
    return Device(**found)


_TEXTS, _OPTIONAL = {"name", "source"}, {"layer_ms", "half_tile"}
_MAY_BE_ZERO = {"waits_ms", "half_tile"}


def _is_rate(value: object, *, may_be_zero: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return value > 0 or (may_be_zero and value == 0)
