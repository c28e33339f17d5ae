"""Computes routing and its losses as pure tensor functions.

Letters: t tokens on this rank, e experts, k experts per token, T tokens of the micro-batch over
the ranks that share it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_CONVENTIONS = ("olmoe", "per_layer")


class Routing(NamedTuple):
    """Holds where each token goes and with what weight."""

    experts: Tensor
    """[t, k] int64: each token's experts, all different."""
    gates: Tensor
    """[t, k] weights of these experts, at least fp32."""
    scores: Tensor
    """[t, e] probabilities over all experts, rows sum to 1: what the load-balancing loss is of."""


def softmax_topk(logits: Tensor, k: int, bias: Tensor | None = None) -> Routing:
    """Applies softmax over all experts, then keeps the k largest as they are (OLMoE).

    The kept probabilities are not normalised again: their sum is the mass of the selection.

    Args:
        logits: [t, e] router outputs, any floating dtype.
        k: experts per token, 1 <= k <= e.
        bias: [e] added to the probabilities for the selection alone; None adds nothing.

    Returns:
        The k experts, largest first, of gates and scores that are fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: k is out of range.
    """
    _check_topk(logits, k)
    scores = logits.softmax(dim=-1, dtype=statistics_dtype(logits))  # [t, e]
    if bias is None:
        gates, experts = scores.topk(k, dim=-1)  # [t, k]
    else:
        experts = (scores + bias).topk(k, dim=-1).indices  # [t, k]
        gates = scores.gather(1, experts)
    return Routing(experts=experts, gates=gates, scores=scores)


def topk_softmax(logits: Tensor, k: int, bias: Tensor | None = None) -> Routing:
    """Keeps the k largest logits, then applies softmax over those k (JetMoE).

    Args:
        logits: [t, e] router outputs, any floating dtype.
        k: experts per token, 1 <= k <= e.
        bias: [e] added to the probabilities over all experts for the selection alone; None adds
            nothing, which selects the largest logits.

    Returns:
        The k experts, largest first; gates that sum to 1 and scores, a softmax over all experts,
        are fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: k is out of range.
    """
    _check_topk(logits, k)
    dtype = statistics_dtype(logits)
    if bias is None:
        largest, experts = logits.topk(k, dim=-1)  # [t, k]
        scores = logits.softmax(dim=-1, dtype=dtype)  # [t, e]
    else:
        scores = logits.softmax(dim=-1, dtype=dtype)  # [t, e]
        experts = (scores + bias).topk(k, dim=-1).indices  # [t, k]
        largest = logits.gather(1, experts)
    gates = largest.softmax(dim=-1, dtype=dtype)  # [t, k]
    return Routing(experts=experts, gates=gates, scores=scores)


def sort_choices(routing: Routing) -> Routing:
    """Sorts each token's experts by their numbers, gates with them.

    Sums over a token's experts then depend on which experts were selected, not on the order of
    their scores.

    Args:
        routing: of any order.

    Raises:
        ValueError: a token has the same expert twice; see `check_on_device`.
    """
    experts, order = routing.experts.sort(dim=-1)  # [t, k]
    check_on_device(
        (experts[:, 1:] != experts[:, :-1]).all(),
        "the router selected an expert twice for one token; its `select` must return k different"
        " experts",
    )
    return routing._replace(experts=experts, gates=routing.gates.gather(1, order))


def dense_routing(
    experts: Tensor, gates: Tensor, *, num_experts: int, is_kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Writes a routing as megatron-core's dispatchers want it.

    Args:
        experts: [t, k] int64.
        gates: [t, k].
        num_experts: e.
        is_kept: [t, k] bool, False for what is in neither result; None keeps all.

    Returns:
        probs: [t, e] of gates' dtype, zero off the selection.
        routing_map: [t, e] bool, k true per row if all are kept.
    """
    zeros = gates.new_zeros(len(experts), num_experts)
    nowhere = torch.zeros_like(zeros, dtype=torch.bool)
    if is_kept is None:
        return zeros.scatter(1, experts, gates), nowhere.scatter_(1, experts, True)
    kept = gates.masked_fill(~is_kept, 0.0)
    return zeros.scatter(1, experts, kept), nowhere.scatter_(1, experts, is_kept)


def count_tokens(experts: Tensor, *, num_experts: int, is_token: Tensor | None = None) -> Tensor:
    """Counts the assignments of each expert, without copying to the host.

    Args:
        experts: int64 of any shape; [t, k] beside `is_token`.
        num_experts: e.
        is_token: [t] bool, False for padding, which is not counted; None counts all.

    Returns:
        [e] int64.
    """
    owners = experts.flatten()
    ones = torch.ones_like(owners)
    if is_token is not None:
        ones = is_token[:, None].expand_as(experts).flatten().to(owners.dtype)
    return owners.new_zeros(num_experts).scatter_add_(0, owners, ones)


def count_by_sequence(
    experts: Tensor, *, num_experts: int, num_sequences: int, is_token: Tensor | None = None
) -> Tensor:
    """Counts the assignments of each expert in each sequence, without copying to the host.

    Args:
        experts: [t, k] int64, the tokens of one position of all sequences next to each other.
        num_experts: e.
        num_sequences: b.
        is_token: [t] bool, False for padding, which is not counted; None counts all.

    Returns:
        [b, e] int64.
    """
    sequence = torch.arange(len(experts), device=experts.device) % num_sequences  # [t]
    cells = experts + sequence[:, None] * num_experts  # [t, k]
    counts = count_tokens(cells, num_experts=num_sequences * num_experts, is_token=is_token)
    return counts.view(num_sequences, num_experts)


def check_on_device(condition: Tensor, message: str) -> None:
    """Refuses numbers for which a condition does not hold.

    Args:
        condition: [] bool.
        message: what is wrong and what to do.

    Raises:
        ValueError: it does not hold; on a GPU a device-side assertion instead, because the host
            does not wait for the answer.
    """
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def load_balancing_loss(
    scores: Tensor, tokens_per_expert: Tensor, *, num_tokens: int | Tensor, topk: int
) -> Tensor:
    """Computes this rank's addend of e * sum_i f_i P_i, which is 1 for a balanced router.

    f_i = n_i / (T k) is the share of assignments that expert i received, P_i the mean probability
    of expert i. `tokens_per_expert` and `num_tokens` count the whole micro-batch, `scores` holds
    the tokens of this rank; summed over the ranks that share the micro-batch the addends make the
    loss. With one rank the addend is the loss. No gradient flows through the counts.

    Source: OLMoE (arXiv 2409.02060) equation 3, with f_i as its training code has it.

    Args:
        scores: [t, e] probabilities over all experts, this rank's tokens; 0 for padding.
        tokens_per_expert: [e] assignments n_i, summed over the ranks that share the micro-batch.
        num_tokens: T; [] where it is counted.
        topk: k.

    Returns:
        [] of scores' dtype.
    """
    shares = tokens_per_expert.to(scores.dtype) / (num_tokens * topk)  # [e]
    return balance_of(scores, shares, num_tokens=num_tokens)


def balance_of(scores: Tensor, shares: Tensor, *, num_tokens: int | Tensor) -> Tensor:
    """Computes this rank's addend of e * sum_i f_i P_i for given f_i; see `load_balancing_loss`.

    Args:
        scores: [t, e] probabilities over all experts, this rank's tokens; 0 for padding.
        shares: [e] f_i.
        num_tokens: T; [] where it is counted.

    Returns:
        [] of scores' dtype.
    """
    means = scores.sum(dim=0) / num_tokens  # [e]
    return scores.shape[-1] * torch.dot(shares, means)


def sequence_balancing_loss(scores: Tensor, tokens_per_expert: Tensor, *, topk: int) -> Tensor:
    """Computes this rank's addend of the mean over sequences of e * sum_i f_i P_i.

    f_i and P_i are those of `load_balancing_loss`, of each sequence alone; a sequence of padding
    alone is none. Summed over the ranks that share the sequences the addends make the loss. No
    gradient flows through the counts.

    Args:
        scores: [t, e] probabilities over all experts, this rank's tokens, those of one position of
            all sequences next to each other; 0 for padding.
        tokens_per_expert: [b, e] assignments n_i, summed over the ranks that share the sequences.
        topk: k.

    Returns:
        [] of scores' dtype.
    """
    num_sequences, num_experts = tokens_per_expert.shape
    assigned = tokens_per_expert.sum(dim=1, keepdim=True)  # [b, 1]
    shares = tokens_per_expert.to(scores.dtype) / assigned.clamp(min=1)  # [b, e]
    sums = scores.view(-1, num_sequences, num_experts).sum(dim=0)  # [b, e]
    means = sums * topk / assigned.clamp(min=1)
    number = assigned.count_nonzero().clamp(min=1)
    return num_experts * (shares * means).sum() / number


def updated_bias(bias: Tensor, tokens_per_expert: Tensor, *, rate: float) -> Tensor:
    """Moves each expert's bias by `rate` toward the mean load: up below it, down above it.

    Source: Wang et al., auxiliary-loss-free load balancing (arXiv 2408.15664), algorithm 1.

    Args:
        bias: [e].
        tokens_per_expert: [e] int64, assignments over the global batch.
        rate: u.

    Returns:
        [e] of bias's dtype.
    """
    # Integers: which side of the mean a count is on does not depend on rounding.
    excess = len(bias) * tokens_per_expert - tokens_per_expert.sum()  # [e]
    return bias - rate * excess.sign().to(bias.dtype)


def router_z_loss(
    logits: Tensor, *, num_tokens: int | Tensor, is_token: Tensor | None = None
) -> Tensor:
    """Computes this rank's addend of the mean over tokens of logsumexp(logits)^2.

    Source: OLMoE (arXiv 2409.02060) equation 4 and ST-MoE, on the router's outputs.

    Args:
        logits: [t, e] router outputs, this rank's tokens.
        num_tokens: T, tokens over the ranks that share the micro-batch; [] where it is counted.
        is_token: [t] bool, False for padding, which has no loss; None for none.

    Returns:
        [] fp32, or fp64 for fp64 logits.
    """
    lse = logits.to(statistics_dtype(logits)).logsumexp(dim=-1)  # [t]
    if is_token is not None:
        lse = lse.masked_fill(~is_token, 0.0)
    return lse.square().sum() / num_tokens


def routing_entropy(scores: Tensor) -> Tensor:
    """Computes the entropy of each token's distribution over the experts, in nats.

    It is 0 for a single expert and ln e for a uniform distribution.

    Args:
        scores: [t, e] probabilities, rows sum to 1; a row of zeros gives 0.

    Returns:
        [t] of scores' dtype.
    """
    return torch.special.entr(scores).sum(dim=-1)


def layer_coefficients(
    convention: str, alpha: float, beta: float, *, num_layers: int, topk: int
) -> tuple[float, float]:
    """Converts a paper's coefficients to those of one layer's losses.

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


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Returns fp32, or the tensor's dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_topk(logits: Tensor, k: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [t, e], got shape {list(logits.shape)}")
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            f"experts per token ({k}) must be between 1 and the number of experts "
            f"({logits.shape[-1]})"
        )
