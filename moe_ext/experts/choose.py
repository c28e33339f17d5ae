"""Chooses the expert backend of a run, and says why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ext import registry
from moe_ext.config import MoEModelConfig
from moe_ext.experts.backends import AUTO, EXPERT_BACKENDS
from moe_ext.experts.interface import ExpertBackend, Use
from moe_ext.layers.lora import LoRA

_HOPPER = (9, 0)
"""Compute capability of H100 and H200."""


@dataclass(frozen=True)
class _Preference:
    """Says in which order backends are asked, and why."""

    names: tuple[str, ...]
    reason: str


_CPU = _Preference(("grouped", "loop"), "the one made for CPUs")
_GPU = _Preference(
    ("grouped", "triton", "loop"), "no other one has been measured to be faster on this GPU"
)
# A layer of OLMoE-1B-7B on an H200, forward and backward: docs/gpu.md.
_HOPPER_BF16 = _Preference(
    ("triton", "grouped", "loop"),
    "measured on an H200 in bf16: 11.8 ms a layer of OLMoE-1B-7B, 'grouped' 17.4",
)


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """Holds a backend and why it is that one."""

    name: str
    """A key of EXPERT_BACKENDS."""
    reason: str
    """For the log."""
    backend: ExpertBackend
    """What the layers compute with."""


def choose_backend(name: str, use: Use) -> BackendChoice:
    """Chooses the backend that a configuration means.

    A run does so once, in `builder.build_model`; tools call it to learn what a run would take.

    Args:
        name: what it says, AUTO or the name of a backend.
        use: what for.

    Raises:
        ValueError: no such backend, or it cannot do it; the message says what to do.
    """
    if name != AUTO:
        known: dict[str, ExpertBackend | None] = {AUTO: None, **EXPERT_BACKENDS}
        backend = registry.look_up(known, name, kind="expert backend")
        assert backend is not None
        problem = _problem(backend, use)
        if problem is not None:
            raise ValueError(f"expert_backend '{name}' {problem}")
        return BackendChoice(
            name=name, reason="named in the configuration", backend=_of(use, backend)
        )
    skipped: list[str] = []
    preference = _preference(use)
    for candidate in preference.names:
        backend = EXPERT_BACKENDS[candidate]
        problem = _problem(backend, use)
        if problem is None:
            reason = "; ".join([*([] if skipped else [preference.reason]), *skipped])
            return BackendChoice(name=candidate, reason=reason, backend=_of(use, backend))
        skipped.append(f"'{candidate}' {problem}")
    raise ValueError(f"no expert backend can be used: {'; '.join(skipped)}")


def _of(use: Use, backend: ExpertBackend) -> ExpertBackend:
    """Returns a backend with or without fused kernels, as the use has it."""
    return (backend.without_kernels or backend) if use.fused_kernels == "off" else backend


def use_of_model(
    model: MoEModelConfig,
    *,
    device_type: str,
    dtype: torch.dtype,
    tensor: int,
    expert_tensor: int,
    recompute_activation: bool = False,
    lora: LoRA | None = None,
) -> Use:
    """Says what a rank needs a backend for.

    Args:
        model: the architecture.
        device_type: "cpu" or "cuda", where the parameters are.
        dtype: of rows and weights.
        tensor: ranks per attention matrix.
        expert_tensor: ranks per expert.
        recompute_activation: whether backward must compute the experts' activation again.
        lora: the adapters; None without.
    """
    widths = model.expert_widths(tensor=tensor, expert_tensor=expert_tensor)
    has_adapters = lora is not None and "experts" in lora.targets
    if lora is not None and widths and {"attention", "experts"} & set(lora.targets):
        widths = (*widths, lora.rank)
    return Use(
        device_type=device_type,
        dtype=dtype,
        widths=widths,
        fused_kernels=model.fused_kernels,
        has_adapters=has_adapters and model.num_experts is not None,
        has_attention=model.attention_experts is not None,
        recompute_activation=recompute_activation and model.num_experts is not None,
        capability=_capability(device_type),
    )


def _preference(use: Use) -> _Preference:
    """Returns the order for a device and precision."""
    if use.device_type == "cpu":
        return _CPU
    is_measured = use.capability == _HOPPER and use.dtype == torch.bfloat16
    return _HOPPER_BF16 if is_measured else _GPU


def _capability(device_type: str) -> tuple[int, int] | None:
    """Returns the compute capability of this process's GPU; None without one."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def _problem(backend: ExpertBackend, use: Use) -> str | None:
    """Says why a backend cannot be used, as `ExpertBackend.problem` does; None if it can."""
    if use.has_attention and backend.projection is None:
        able = _names(lambda each: each.projection is not None)
        return (
            "has no projection, which moa attention is made of; give one to"
            f" register_expert_backend, or use expert_backend {able}"
        )
    if use.has_adapters and backend.projection is None:
        able = _names(lambda each: each.projection is not None)
        return (
            "has no projection, which experts with adapters are made of; give one to"
            f" register_expert_backend, or use expert_backend {able}"
        )
    if use.has_adapters and use.recompute_activation:
        return (
            "keeps its activation where experts have adapters (lora_targets), but"
            " recompute_modules names moe_act; name moe instead, or drop it"
        )
    if use.recompute_activation and backend.keeps_activation:
        able = _names(lambda each: not each.keeps_activation)
        return (
            "keeps its activation, but recompute_modules names moe_act; use expert_backend"
            f" {able}, or drop moe_act"
        )
    return backend.problem(use)


def _names(is_able: Callable[[ExpertBackend], bool]) -> str:
    return " or ".join(sorted(name for name, each in EXPERT_BACKENDS.items() if is_able(each)))
