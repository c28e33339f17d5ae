"""Times training steps at several sizes, ours and transformers', all in every round."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ceilings import build_ceilings
from benchmarks.digests import largest_difference
from benchmarks.session import (
    CEILINGS,
    GRADIENT_LIMITS,
    LOSS_LIMITS,
    NATIVE,
    DifferentMathsError,
)
from benchmarks.shapes import SHAPES, Shape, resize
from benchmarks.timing import interleave, paired_ratio, summarize
from benchmarks.workers import Entry, Worker
from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.presets import PRESETS

PEER = "transformers-grouped_mm"
CPU = torch.device("cpu")

BLOCK = Shape(
    # OLMoE's block, small enough for a dozen processes in 16 GB, with a vocabulary so small that
    # layers dominate the time.
    model=MoEModelConfig(
        **{
            **PRESETS["olmoe_1b_7b"],
            "num_layers": 2,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "moe_ffn_hidden_size": 192,
            "vocab_size": 4096,
            "moe_aux_loss_coeff": 0.0,
            "moe_z_loss_coeff": 0.0,
        }
    ),
    seq_length=256,
    micro_batch_size=8,
)
"""Shape of which each sweep varies one size."""

DEFAULT_VALUES: Mapping[str, Sequence[int]] = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "experts": (8, 16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Sets how the points are measured."""

    rounds: int
    """Timed steps of each point."""
    warmup: int
    """Untimed steps before them."""
    num_threads: int | None
    """CPU threads of a process; None leaves torch's default."""
    gemm_size: int
    """Size of the GEMM that is the ceiling."""
    with_peer: bool = True
    """Time transformers too."""


def points(sweep: str, base: Shape, values: Sequence[int]) -> dict[int, Shape]:
    """Build the shapes of a sweep, by the value of the varied size.

    * tokens: sequences are added.
    * experts: k * f and e * f are the base's, so that parameters and active FLOPs stay the same
      and experts get finer. Only the router grows.
    * layers: layers are added.

    Raises:
        SystemExit: a value does not fit the base.
    """
    make = {"tokens": _with_tokens, "experts": _with_experts, "layers": _with_layers}[sweep]
    return {value: make(base, value) for value in values}


def _with_tokens(base: Shape, value: int) -> Shape:
    if value % base.seq_length:
        raise SystemExit(
            f"{value} tokens must be whole sequences; use multiples of {base.seq_length}"
        )
    return resize(base, num_layers=None, seq_length=None, micro_batch_size=value // base.seq_length)


def _with_experts(base: Shape, value: int) -> Shape:
    model = base.model
    assert model.num_experts is not None
    topk, rest = divmod(value * model.moe_router_topk, model.num_experts)
    ffn, left = divmod(model.num_experts * model.moe_ffn_hidden_size, value)
    if rest or left or not topk:
        raise SystemExit(
            f"{value} experts cannot be made of {model.num_experts} with top-"
            f"{model.moe_router_topk} and width {model.moe_ffn_hidden_size} at the same k * f; use"
            f" {model.num_experts // model.moe_router_topk} times a power of 2"
        )
    changed = dataclasses.replace(
        model, num_experts=value, moe_router_topk=topk, moe_ffn_hidden_size=ffn
    )
    return dataclasses.replace(base, model=changed)


def _with_layers(base: Shape, value: int) -> Shape:
    return resize(base, num_layers=value, seq_length=None, micro_batch_size=None)


def base_shape(name: str | None) -> Shape:
    """Return BLOCK, or the named shape of the other benchmarks."""
    return BLOCK if name is None else SHAPES[name]


def measure(shapes: Mapping[int, Shape], how: Measurement) -> dict[str, Any]:
    """Time every point; each has its own processes, which take turns.

    Raises:
        DifferentMathsError: loss or gradients differ from the peer's.
    """
    visits = dict(_entries(shapes, how))
    workers = {
        name: Worker(entry, device=CPU, num_threads=how.num_threads)
        for name, entry in visits.items()
    }
    samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in visits}
    try:
        for value in shapes if how.with_peer else ():
            _compare(workers[_key(NATIVE, value)], workers[_key(PEER, value)], value)
        for worker in workers.values():
            for number in range(how.warmup):
                worker.call("sample", number)
            worker.call("restart_peak")
        for number, name in interleave(list(visits), how.rounds):
            samples[name].append(workers[name].call("sample", how.warmup + number))
        peaks = {name: worker.call("peak_bytes") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "gemm_flops_per_second": dataclasses.asdict(
            summarize([each["flops_per_second"] for each in samples[CEILINGS]])
        ),
        "points": [
            _point(value, shape, samples, peaks, how.with_peer) for value, shape in shapes.items()
        ],
    }


def _key(implementation: str, value: int) -> str:
    return f"{implementation}@{value}"


def _entries(shapes: Mapping[int, Shape], how: Measurement) -> Iterator[tuple[str, Entry]]:
    from benchmarks import layer_transformers, step_peers

    yield CEILINGS, Entry(build_ceilings, (torch.float32, how.gemm_size))
    for value, shape in shapes.items():
        yield _key(NATIVE, value), Entry(step_peers.build_native, (shape, torch.float32))
        if how.with_peer:
            yield (
                _key(PEER, value),
                Entry(
                    step_peers.build_transformers,
                    (shape, torch.float32, "grouped_mm", True),
                    "transformers",
                    layer_transformers.load,
                ),
            )


def _compare(mine: Worker, theirs: Worker, value: int) -> None:
    loss, digests = mine.call("check")
    expected, wanted = theirs.call("check")
    difference, tensor = largest_difference(digests, wanted)
    limit = LOSS_LIMITS[torch.float32] * max(1.0, abs(expected))
    if not abs(loss - expected) <= limit or not difference <= GRADIENT_LIMITS[torch.float32]:
        raise DifferentMathsError(
            f"at {value} the loss is {loss:.6g} and {PEER}'s {expected:.6g}, and the gradient of"
            f" {tensor} differs by {difference:.3g} of its norm; nothing was timed"
        )


def _point(
    value: int,
    shape: Shape,
    samples: Mapping[str, Sequence[Mapping[str, float]]],
    peaks: Mapping[str, int],
    with_peer: bool,
) -> dict[str, Any]:
    model = shape.model
    names = (NATIVE, PEER) if with_peer else (NATIVE,)
    seconds = {name: [each["seconds"] for each in samples[_key(name, value)]] for name in names}
    flops = training_flops_per_token(model, shape.seq_length) * shape.num_tokens
    found: dict[str, Any] = {
        "value": value,
        "tokens": shape.num_tokens,
        "experts": model.num_experts,
        "topk": model.moe_router_topk,
        "ffn": model.moe_ffn_hidden_size,
        "layers": model.num_layers,
        "parameters": count_parameters(model).total,
        "model_flops": flops,
        "implementations": {
            name: {
                "seconds": series,
                "milliseconds": dataclasses.asdict(summarize([1e3 * each for each in series])),
                "tokens_per_second": dataclasses.asdict(
                    summarize([shape.num_tokens / each for each in series])
                ),
                "peak_bytes": peaks[_key(name, value)],
            }
            for name, series in seconds.items()
        },
    }
    if with_peer:
        found["peer_time_over_native"] = dataclasses.asdict(
            paired_ratio(seconds[PEER], seconds[NATIVE])
        )
    return found


def table(sweep: str, found: Mapping[str, Any]) -> str:
    """Format a Markdown table, a row per point: medians (minimum to maximum)."""
    names = list(found["points"][0]["implementations"])
    lines = [
        f"| {sweep} | " + " | ".join(f"{name}: ms | GB" for name in names) + " | peer / native |",
        "|---:|" + "---:|" * (2 * len(names) + 1),
    ]
    for point in found["points"]:
        cells = [_label(sweep, point)]
        for row in point["implementations"].values():
            cells += [spread(row["milliseconds"], ".0f"), f"{row['peak_bytes'] / 1e9:.2f}"]
        ratio = point.get("peer_time_over_native")
        cells.append(spread(ratio, ".2f") if ratio else "")
        lines.append(f"| {' | '.join(cells)} |")
    rate = {key: each / 1e9 for key, each in found["gemm_flops_per_second"].items()}
    return "\n".join(
        [*lines, "", f"A large GEMM in the same rounds: {spread(rate, '.0f')} GFLOP/s."]
    )


def _label(sweep: str, point: Mapping[str, Any]) -> str:
    if sweep == "experts":
        return f"{point['value']} (k {point['topk']}, f {point['ffn']})"
    return f"{point['value']:,}"


def spread(summary: Mapping[str, float], form: str) -> str:
    """Format a summary as "median (minimum to maximum)"."""
    return f"{summary['median']:{form}} ({summary['low']:{form}} to {summary['high']:{form}})"
