"""Defines the measured shapes and routings, and computes their model FLOPs."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.counting import training_flops_per_token
from moe_ext.functional import load_balancing_loss, routing_entropy
from moe_ext.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Holds a model and the size of its batch."""

    model: MoEModelConfig
    """The architecture, without auxiliary losses in the gradient."""
    seq_length: int
    """s."""
    micro_batch_size: int
    """b."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a step (t)."""
        return self.seq_length * self.micro_batch_size


def _shape(preset: str, seq_length: int, micro_batch_size: int, **changes: object) -> Shape:
    fields = {**PRESETS[preset], "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0, **changes}
    return Shape(
        model=MoEModelConfig(**fields), seq_length=seq_length, micro_batch_size=micro_batch_size
    )


SHAPES: dict[str, Shape] = {
    "olmoe": _shape("olmoe_1b_7b", 4096, 4),
    "jetmoe": _shape("jetmoe_8b", 4096, 4),
    # OLMoE's block at a size that two CPU cores can train.
    "small": _shape(
        "olmoe_1b_7b", 512, 4,
        num_layers=4, hidden_size=512, num_attention_heads=8, moe_ffn_hidden_size=256,
    ),
    # For tests.
    "olmoe_toy": _shape(
        "olmoe_tiny", 16, 2,
        num_layers=2, hidden_size=32, num_experts=16, moe_router_topk=4, moe_ffn_hidden_size=16,
        vocab_size=256,
    ),
    "jetmoe_toy": _shape(
        "jetmoe_tiny", 16, 2,
        num_layers=2, hidden_size=32, kv_channels=8, moe_ffn_hidden_size=16, vocab_size=256,
    ),
}  # fmt: skip
"""Shapes by the name that --shape takes."""


def resize(
    shape: Shape, *, num_layers: int | None, seq_length: int | None, micro_batch_size: int | None
) -> Shape:
    """Return the shape with the given sizes replaced."""
    model = shape.model
    if num_layers is not None:
        model = dataclasses.replace(model, num_layers=num_layers)
    return Shape(
        model=model,
        seq_length=seq_length or shape.seq_length,
        micro_batch_size=micro_batch_size or shape.micro_batch_size,
    )


def experts_flops(shape: Shape) -> float:
    """Count the model FLOPs of one layer's experts, forward and backward, without the router."""
    model = shape.model
    matrices = 3 * model.hidden_size * model.moe_ffn_hidden_size
    return 6.0 * shape.num_tokens * model.moe_router_topk * matrices


def causal_flops_per_token(model: MoEModelConfig, seq_length: int) -> float:
    """Count a training step's model FLOPs a token with half of the attention's square.

    A causal mask leaves so much. Scores are all that depends on the length of a sequence.
    """
    full, without = (training_flops_per_token(model, length) for length in (seq_length, 0))
    return (full + without) / 2


def moa_flops(shape: Shape, *, is_causal: bool = False) -> float:
    """Count the model FLOPs of one mixture of attention heads, forward and backward.

    Args:
        shape: sizes.
        is_causal: count half of the scores, not all.
    """
    model = shape.model
    width = (model.num_query_groups or 0) * (model.kv_channels or 0)
    projections = 2 * width * model.hidden_size * (1 + model.attention_topk)
    scores = 12 * model.attention_topk * width * shape.seq_length
    return float(shape.num_tokens * (6 * projections + scores / (2 if is_causal else 1)))


@dataclass(frozen=True)
class Routing:
    """Holds the experts of each token and their weights."""

    experts: Tensor
    """[t, k] int64."""
    gates: Tensor
    """[t, k] fp32."""
    scores: Tensor
    """[t, e] fp32, the probabilities that the gates come from."""

    def describe(self) -> dict[str, float]:
        """Compute entropy (nats), top-k mass, load-balancing loss and the highest expert load."""
        num_tokens, topk = self.experts.shape
        counts = self.experts.flatten().bincount(minlength=self.scores.shape[1])
        balance = load_balancing_loss(self.scores, counts, num_tokens=num_tokens, topk=topk)
        return {
            "mean_entropy": routing_entropy(self.scores).mean().item(),
            "mean_selected_mass": self.scores.gather(1, self.experts).sum(dim=1).mean().item(),
            "load_balancing_loss": balance.item(),
            "max_load_ratio": (counts.max() / counts.double().mean()).item(),
        }


ROUTINGS = ("learned", "balanced", "skewed")

COMPARED = -1
"""Number of the data that implementations are compared on; samples are counted from 0."""

# Logits of the released OLMoE-1B-7B: softmax entropy 3.45 to 3.99 nats of 4.16, top-8 mass 0.30 to
# 0.55, load-balancing loss 1.14 on web text. Normal logits with these deviations give such figures.
_LOGIT_STD = 0.76
_EXPERT_STD = 0.25


def make_routing(
    kind: str,
    *,
    num_tokens: int,
    num_experts: int,
    topk: int,
    rule: str,
    number: int = COMPARED,
) -> Routing:
    """Sample a routing of the given kind on the CPU.

    * learned: the largest of normal logits, expert by expert shifted, with entropy, mass and
      balance as measured in the released OLMoE-1B-7B. A token's expert tells nothing of the next's.
    * balanced: each expert gets as many tokens as any other (or one more).
    * skewed: half of all assignments go to 4 of 64 experts, a sixteenth (JetMoE: 1 of 8).

    Gates are those of the learned kind in all cases. Which experts are preferred is the same for
    all numbers, as in a model whose router does not change; the tokens are others.

    Args:
        kind: one of ROUTINGS.
        num_tokens: t.
        num_experts: e.
        topk: k.
        rule: "softmax_topk", or "topk_softmax" whose gates add up to 1.
        number: of the sample.

    Raises:
        ValueError: the kind is unknown.
    """
    router = torch.Generator().manual_seed(1)
    generator = torch.Generator().manual_seed(1000 + number)
    shift = _EXPERT_STD * torch.randn(num_experts, generator=router)
    noise = torch.randn(num_tokens, num_experts, generator=generator)
    scores = (shift + _LOGIT_STD * noise).softmax(dim=-1)  # [t, e]
    gates, experts = scores.topk(topk, dim=-1)  # [t, k]
    if rule == "topk_softmax":
        gates = gates / gates.sum(dim=-1, keepdim=True)
    if kind == "learned":
        return Routing(experts, gates, scores)
    order = torch.randperm(num_experts, generator=router)
    shuffled = torch.randperm(num_tokens, generator=generator)
    if kind == "balanced":
        turns = torch.arange(num_tokens * topk) % num_experts
        return Routing(order[turns.view(num_tokens, topk)][shuffled], gates, scores)
    if kind != "skewed":
        raise ValueError(f"unknown routing '{kind}'; use {', '.join(ROUTINGS)}")
    num_hot = max(1, num_experts // 16)
    hot_slots = min(num_hot, -(-topk // 2))
    hot = torch.arange(num_tokens * hot_slots) % num_hot
    cold_slots = topk - hot_slots
    cold = num_hot + torch.arange(num_tokens * cold_slots) % (num_experts - num_hot)
    chosen = torch.cat(
        (hot.view(num_tokens, hot_slots), cold.view(num_tokens, cold_slots)), dim=1
    )  # [t, k]
    return Routing(order[chosen][shuffled], gates, scores)
