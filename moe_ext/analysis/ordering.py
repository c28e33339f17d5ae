"""Orders chosen experts as the measures expect them, and reads router outputs as choices."""

from typing import NamedTuple

from torch import Tensor

from moe_ext.functional import Routing

_SUM_TOLERANCE = 2e-2
"""A row of bf16 probabilities over 512 experts adds up to 1 within this."""


class Choices(NamedTuple):
    """Holds the experts of each token, the largest gate first."""

    experts: Tensor
    """[t, k] int64."""
    gates: Tensor
    """[t, k] fp32."""


def by_gate(routing: Routing) -> Choices:
    """Sorts each token's experts by falling gates, equal ones by the experts' numbers."""
    experts, order = routing.experts.sort(dim=-1)  # [t, k]
    gates = routing.gates.gather(1, order)
    gates, order = gates.sort(dim=-1, descending=True, stable=True)  # [t, k]
    return Choices(experts=experts.gather(1, order), gates=gates.float())


def choices_of_outputs(outputs: Tensor, topk: int, *, renormalizes: bool) -> Choices:
    """Returns the choices behind router outputs, as transformers' `router_logits` are.

    transformers 5.0 to 5.3 returns probabilities under that name, later versions logits. Rows that
    are nowhere negative and add up to 1 are probabilities; a softmax of theirs would give the same
    experts, but other gates.

    Args:
        outputs: [t, e] logits, or probabilities over all experts.
        topk: k.
        renormalizes: gates add up to 1 over the k (JetMoE); otherwise they are the probabilities
            as they are (OLMoE).

    Raises:
        ValueError: k is out of range.
    """
    if outputs.ndim != 2 or not 1 <= topk <= outputs.shape[1]:
        raise ValueError(
            f"router outputs are {list(outputs.shape)} and k is {topk}; outputs must be [t, e],"
            " and k from 1 to e"
        )
    values = outputs.float()
    scores = values if are_probabilities(values) else values.softmax(dim=-1)  # [t, e]
    # Equal outputs go to the expert of the lowest number, whatever `topk` would prefer.
    ordered, experts = values.sort(dim=-1, descending=True, stable=True)
    del ordered
    experts = experts[:, :topk]  # [t, k]
    gates = scores.gather(1, experts)
    if renormalizes:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return Choices(experts=experts, gates=gates)


def are_probabilities(outputs: Tensor) -> bool:
    """Returns whether every row [e] is nowhere negative and adds up to 1."""
    values = outputs.float()
    sums = values.sum(dim=-1)
    return bool((values >= 0).all() and ((sums - 1).abs() < _SUM_TOLERANCE).all())
