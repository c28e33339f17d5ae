"""Which expert backend a run takes, and why."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_ext import registry
from moe_ext.experts.backends import AUTO, EXPERT_BACKENDS, ExpertBackend, Use

# In the order in which they are asked. Nothing was measured on a GPU yet, so what is best known
# goes first there; the others are there by name.
_PREFERRED = {"cpu": ("grouped", "loop"), "cuda": ("grouped", "triton", "loop")}
_REASONS = {
    "cpu": "the one made for CPUs",
    "cuda": "no other one has been measured to be faster on a GPU",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend and why it is that one."""

    name: str
    """A key of EXPERT_BACKENDS."""
    reason: str
    """For the log."""


def choose_backend(name: str, use: Use) -> Choice:
    """The backend that a configuration means.

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
        problem = backend.problem(use)
        if problem is not None:
            raise ValueError(f"expert_backend '{name}' {problem}")
        return Choice(name=name, reason="named in the configuration")
    passed: list[str] = []
    for candidate in _PREFERRED[use.device_type]:
        problem = EXPERT_BACKENDS[candidate].problem(use)
        if problem is None:
            return Choice(name=candidate, reason="; ".join([_REASONS[use.device_type], *passed]))
        passed.append(f"'{candidate}' {problem}")
    raise ValueError(f"no expert backend can be used: {'; '.join(passed)}")


def use_of(config: TransformerConfig, *widths: int) -> Use:
    """What a rank of this process needs a backend for.

    Args:
        config: megatron-core's; its parameters lie where `new_parameter` puts them.
        widths: of rows that are multiplied, on this rank.
    """
    device_type = "cpu"
    if torch.cuda.is_available() and not config.use_cpu_initialization:
        current = torch.cuda.current_device()
        device_type = current.type if isinstance(current, torch.device) else "cuda"
    return Use(device_type=device_type, dtype=config.params_dtype, widths=widths)
