"""Says which parameters decay, and which train at another rate than the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.optimizer.optimizer_config import (
    ParamKey,
    ParamPredicate,
    ParamWithNamePredicate,
)

DecayRule = Literal["all", "matrices"]


@dataclass(frozen=True, kw_only=True)
class GroupRates:
    """Multiplies the learning rate and the weight decay of some parameters."""

    name: str
    """Of the group, unique in a run."""
    has: Callable[[str], bool]
    """Whether a parameter is one of them, by its name in the wrapped chunk."""
    lr: float = 1.0
    """Factor of the learning rate."""
    weight_decay: float = 1.0
    """Factor of the weight decay."""


def decay_overrides(
    rule: DecayRule, rates: Sequence[GroupRates] = ()
) -> dict[ParamKey, dict[str, float]]:
    """Return megatron-core's group overrides for a weight-decay rule and rates of groups.

    `all` is OLMoE's (norms, QK-norms, embeddings and biases decay too; paper sections 4.2.3 and
    4.2.4). `matrices` leaves one-dimensional parameters alone, as Megatron-LM does.
    """
    overrides: dict[ParamKey, dict[str, float]] = {}
    if rule == "matrices":
        vectors = ParamPredicate(name="vectors", fn=_is_vector)
        overrides[ParamKey(predicate=vectors)] = {"wd_mult": 0.0}
    for group in rates:
        if group.lr != 1.0:
            overrides[_key(f"{group.name} rate", group.has)] = {"lr_mult": group.lr}
        if group.weight_decay != 1.0:
            key = _key(f"{group.name} decay", group.has, matrices_only=rule == "matrices")
            overrides[key] = {"wd_mult": group.weight_decay}
    return overrides


def _key(name: str, has: Callable[[str], bool], *, matrices_only: bool = False) -> ParamKey:
    """Return megatron-core's key for the parameters that `has` accepts."""

    def matches(parameter: torch.nn.Parameter, parameter_name: str) -> bool:
        return has(parameter_name) and not (matrices_only and _is_vector(parameter))

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _is_vector(parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 1
