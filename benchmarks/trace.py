"""Sums up a trace of the trainer's profiler: kernels by group, launches and waits of a step."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.trainer.hooks.profiler import DEVICE, DEVICE_WAITS, HOST, HOST_READ, sum_up

GROUPS: tuple[tuple[str, str], ...] = (
    ("optimizer, clipping and norms of gradients", r"adam|multi_tensor|foreach|lpnorm"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("communication", r"nccl|c10d|all_?reduce|all_?gather"),
    (
        "grouped products",
        r"\b(product|gated|(gated|weight)_gradient)_kernel|grouped|groupproblem|ptrarray|quack|expert",
    ),
    ("dense products", r"gemm|gemv|nvjet|cublas|xmma|splitk|aten::(add|b|badd)?mm|mkldnn|linear"),
    (
        "softmax and cross-entropy",
        r"softmax|cross_?entropy|nll_loss|\b(statistics|gradient)_kernel",
    ),
    ("normalization", r"norm|rsqrt"),
    ("sorting and counting", r"sort|topk|radix|bitonic|scan|cumsum|histogram|bincount"),
    ("gathers and scatters", r"gather|scatter|index|embedding|slots"),
    ("copies, casts and concatenations", r"copy|memcpy|catarray|::cat\b|transpose|::to\b"),
    ("fills", r"memset|fill|zero"),
    ("reductions", r"reduce|::sum|::mean|::max|::min"),
    (
        "elementwise",
        r"elementwise|vectorized|gated_unit|triton|aten::(mul|add|div|sub|silu|sigmoid|exp|neg)",
    ),
)
"""A group, and what names of its kernels (on a CPU: operations) contain; the first counts."""
OTHER = "others"
LAUNCH = re.compile(r"launch_?kernel|cudagraphlaunch", re.IGNORECASE)
_LONGEST = 12
_MATCHES = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in GROUPS)


def sum_up_trace(events: Sequence[Mapping[str, Any]], *, num_steps: int) -> dict[str, Any]:
    """Sum up what a step took.

    Without a GPU in the trace the operations of the CPU stand for its kernels.

    Args:
        events: those of a Chrome trace, as torch.profiler exports it.
        num_steps: steps in it.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    steps = [each for each in timed if re.fullmatch(r"step \d+", each["name"]) and _is_host(each)]
    device = [event for event in timed if event.get("cat") in DEVICE]
    kernels = device or [event for event in timed if event.get("cat") == "cpu_op"]
    calls = [each for each in timed if each.get("cat") in HOST and _is_within(each, steps)]
    operations = sum_up(kernels)
    groups: dict[str, list[float]] = {}
    for name, operation in operations.items():
        group = groups.setdefault(group_of(name), [0.0, 0.0])
        group[0] += operation.own_us / 1e3 / num_steps
        group[1] += operation.calls / num_steps
    longest = sorted(operations.items(), key=lambda each: -each[1].own_us)[:_LONGEST]
    wall_us = max(map(_end, steps)) - min(each["ts"] for each in steps)
    return {
        "num_steps": num_steps,
        "has_gpu": bool(device),
        "wall_ms": wall_us / 1e3 / num_steps,
        "busy_ms": busy_us(kernels) / 1e3 / num_steps,
        "kernels": len(kernels) / num_steps,
        "launches": sum(bool(LAUNCH.search(each["name"])) for each in calls) / num_steps,
        "waits": _waits(calls, num_steps),
        "groups": {
            name: {"ms": ms, "calls": number}
            for name, (ms, number) in sorted(groups.items(), key=lambda each: -each[1][0])
        },
        "longest": [
            {"name": name, "ms": each.own_us / 1e3 / num_steps, "calls": each.calls / num_steps}
            for name, each in longest
        ],
    }


def group_of(name: str) -> str:
    """Return the group of a kernel or an operation."""
    return next((group for group, match in _MATCHES if match.search(name)), OTHER)


def busy_us(events: Sequence[Mapping[str, Any]]) -> float:
    """Return how long at least one of the events ran, in microseconds."""
    busy, last = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start = max(event["ts"], last)
        if _end(event) > start:
            busy += _end(event) - start
            last = _end(event)
    return busy


def _waits(calls: Sequence[Mapping[str, Any]], num_steps: int) -> dict[str, dict[str, float]]:
    """Return calls and milliseconds a step of what makes the host wait."""
    found = {}
    for name in (*DEVICE_WAITS, HOST_READ):
        spent = [event["dur"] for event in calls if event["name"] == name]
        if spent:
            found[name] = {"calls": len(spent) / num_steps, "ms": sum(spent) / 1e3 / num_steps}
    return found


def _is_host(event: Mapping[str, Any]) -> bool:
    """Return whether a step's range is the host's; on a GPU there is another of the same name."""
    return event.get("cat") == "user_annotation"


def _is_within(event: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an event began in a step; the profiler itself waits for the GPU after one."""
    return any(step["ts"] <= event["ts"] < _end(step) for step in steps)


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"] + event["dur"])
