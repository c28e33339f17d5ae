"""Routing and its losses as pure tensor functions.

Letters: t tokens on this rank, e experts, k experts per token, T tokens of the micro-batch over
the ranks that share it.
"""

import torch
from torch import Tensor

from moe_ext.checks import check_on_device

_CONVENTIONS = ("olmoe", "per_layer")


def softmax_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then keep the k largest as they are (OLMoE).

    The kept probabilities are not normalised again: their sum is the mass of the selection.

    Args:
        logits: [t, e] router outputs, any floating dtype.
        k: experts per token, 1 <= k <= e.

    Returns:
        probs: [t, e] weights, zero off the selection; fp32, or fp64 for fp64 logits.
        routing_map: [t, e] bool, exactly k true per row.
        scores: [t, e] probabilities before the selection, of probs' dtype.

    Raises:
        ValueError: k is out of range.
    """
    _check_topk(logits, k)
    scores = logits.softmax(dim=-1, dtype=_statistics_dtype(logits))  # [t, e]
    routing_map = _selection(scores, scores.topk(k, dim=-1).indices)
    return scores.masked_fill(~routing_map, 0.0), routing_map, scores


def topk_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the k largest logits, then softmax over those k (JetMoE).

    Args:
        logits: [t, e] router outputs, any floating dtype.
        k: experts per token, 1 <= k <= e.

    Returns:
        probs: [t, e] weights, zero off the selection, rows sum to 1; fp32, or fp64 for fp64 logits.
        routing_map: [t, e] bool, exactly k true per row.
        scores: [t, e] softmax over all experts, which the load-balancing loss is made of.

    Raises:
        ValueError: k is out of range.
    """
    _check_topk(logits, k)
    dtype = _statistics_dtype(logits)
    largest, indices = logits.topk(k, dim=-1)  # [t, k]
    gates = largest.softmax(dim=-1, dtype=dtype)  # [t, k]
    probs = torch.zeros_like(logits, dtype=dtype).scatter(1, indices, gates)  # [t, e]
    return probs, _selection(logits, indices), logits.softmax(dim=-1, dtype=dtype)


def selected_experts(probs: Tensor, routing_map: Tensor, *, topk: int) -> tuple[Tensor, Tensor]:
    """A routing as lists: each token's experts, in the order of their numbers, and their weights.

    Args:
        probs: [t, e] weights, zero off the selection.
        routing_map: [t, e] bool, k true per row; where there are fewer, others follow whose weight
            is 0.
        topk: k.

    Returns:
        experts: [t, k] int64.
        gates: [t, k] of probs' dtype.

    Raises:
        ValueError: a row has more; see `checks.check_on_device`.
    """
    check_on_device(
        (routing_map.sum(dim=-1) <= topk).all(),
        f"the router selected more than topk ({topk}) experts for a token; its `select` must select"
        " as many as the configuration says",
    )
    chosen_first = routing_map.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    experts = chosen_first[:, :topk]  # [t, k]
    return experts, probs.gather(1, experts)


def load_balancing_loss(
    scores: Tensor, tokens_per_expert: Tensor, *, num_tokens: int, topk: int
) -> Tensor:
    """This rank's addend of e * sum_i f_i P_i, which is 1 for a balanced router.

    f_i = n_i / (T k) is the share of assignments that expert i received, P_i the mean probability
    of expert i. `tokens_per_expert` and `num_tokens` count the whole micro-batch, `scores` holds
    the tokens of this rank; summed over the ranks that share the micro-batch the addends make the
    loss. With one rank the addend is the loss. No gradient flows through the counts.

    Source: OLMoE (arXiv 2409.02060) equation 3, with f_i as its training code has it.

    Args:
        scores: [t, e] probabilities over all experts, this rank's tokens.
        tokens_per_expert: [e] assignments n_i, summed over the ranks that share the micro-batch.
        num_tokens: T.
        topk: k.

    Returns:
        [] of scores' dtype.
    """
    shares = tokens_per_expert.to(scores.dtype) / (num_tokens * topk)  # [e]
    means = scores.sum(dim=0) / num_tokens  # [e]
    return scores.shape[-1] * torch.dot(shares, means)


def router_z_loss(logits: Tensor, *, num_tokens: int) -> Tensor:
    """This rank's addend of the mean over tokens of logsumexp(logits)^2.

    Source: OLMoE (arXiv 2409.02060) equation 4 and ST-MoE, on the router's outputs.

    Args:
        logits: [t, e] router outputs, this rank's tokens.
        num_tokens: T, tokens over the ranks that share the micro-batch.

    Returns:
        [] fp32, or fp64 for fp64 logits.
    """
    lse = logits.to(_statistics_dtype(logits)).logsumexp(dim=-1)  # [t]
    return lse.square().sum() / num_tokens


def routing_entropy(scores: Tensor) -> Tensor:
    """Entropy of each token's distribution over the experts, in nats: 0 sure, ln e uniform.

    Args:
        scores: [t, e] probabilities, rows sum to 1.

    Returns:
        [t] of scores' dtype.
    """
    return torch.special.entr(scores).sum(dim=-1)


def layer_coefficients(
    convention: str, alpha: float, beta: float, *, num_layers: int, topk: int
) -> tuple[float, float]:
    """What one layer's losses are multiplied by, from a paper's coefficients.

    megatron-core adds every layer's loss in full. OLMoE's training code averages both losses over
    the layers and divides the z-loss by k besides; JetMoE's applies its coefficients per router.

    Args:
        convention: "olmoe" or "per_layer".
        alpha: load-balancing coefficient as the paper states it.
        beta: router z-loss coefficient as the paper states it.
        num_layers: MoE layers of the whole model.
        topk: k.

    Returns:
        Coefficients of one layer's load-balancing loss and of its z-loss.

    Raises:
        ValueError: the convention is unknown.
    """
    if convention == "olmoe":
        return alpha / num_layers, beta / (num_layers * topk)
    if convention == "per_layer":
        return alpha, beta
    raise ValueError(f"unknown loss convention '{convention}'; known: {', '.join(_CONVENTIONS)}")


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    """At least fp32, whatever the model's precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _selection(like: Tensor, indices: Tensor) -> Tensor:
    """[t, e] bool of like's shape, true at the indices [t, k]."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, indices, True)


def _check_topk(logits: Tensor, k: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [t, e], got shape {list(logits.shape)}")
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            f"experts per token ({k}) must be between 1 and the number of experts "
            f"({logits.shape[-1]})"
        )
