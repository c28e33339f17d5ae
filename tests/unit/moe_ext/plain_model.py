"""The whole model as plain loops over layers, tokens and experts, from a chunk's own weights."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.config import MoEModelConfig

Weights = dict[str, Tensor]
"""Parameters by their names in a chunk that is the whole model."""


def plain_loss(weights: Weights, model: MoEModelConfig, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of predicting tokens [b, s + 1], with both losses of the routers."""
    hidden = weights["embedding.word_embeddings.weight"][tokens[:, :-1]]  # [b, s, h]
    auxiliary = hidden.new_zeros(())
    for layer in range(model.num_layers):
        own = f"decoder.layers.{layer}"
        into = norm(hidden, weights, f"{own}.input_layernorm", model)
        hidden = hidden + attention(into, weights, f"{own}.self_attention", model)
        into = norm(hidden, weights, f"{own}.pre_mlp_layernorm", model)
        output, extra = feed_forward(into, weights, own, model)
        hidden, auxiliary = hidden + output, auxiliary + extra
    final = replace(model, norm_epsilon=model.final_norm_epsilon or model.norm_epsilon)
    hidden = norm(hidden, weights, "decoder.final_layernorm", final)
    logits = hidden @ weights["output_layer.weight"].T
    logits = logits[..., : model.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + auxiliary


def norm(hidden: Tensor, weights: Weights, name: str, model: MoEModelConfig) -> Tensor:
    """RMSNorm with the weight of that name, or LayerNorm without any."""
    if model.normalization == "NonParametricLayerNorm":
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt()
    mean_square = hidden.square().mean(-1, keepdim=True)
    return hidden / (mean_square + model.norm_epsilon).sqrt() * weights[f"{name}.weight"]


def attention(into: Tensor, weights: Weights, own: str, model: MoEModelConfig) -> Tensor:
    """Causal attention of [b, s, h], head by head."""
    size = model.head_size
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    fused = into @ weights[f"{own}.linear_qkv.weight"].T
    by_group = fused.unflatten(2, (groups, heads // groups + 2, size))
    q, k, v = (part.flatten(2) for part in by_group.split((heads // groups, 1, 1), dim=3))
    if model.attention == "full_width_qk_norm":
        q = norm(q, weights, f"{own}.q_norm", model)
        k = norm(k, weights, f"{own}.k_norm", model)
    outputs = []
    for head in range(heads):
        query = q[..., head * size : (head + 1) * size]
        group = head // (heads // groups)
        key, value = (x[..., group * size : (group + 1) * size] for x in (k, v))
        scores = rotated(query, model) @ rotated(key, model).mT / math.sqrt(size)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    return torch.cat(outputs, -1) @ weights[f"{own}.linear_proj.weight"].T


def rotated(vectors: Tensor, model: MoEModelConfig) -> Tensor:
    """RoPE of [b, s, hn]: channel i turns with channel i + hn / 2."""
    half = vectors.shape[-1] // 2
    steps = torch.arange(half, dtype=torch.float64) / half
    angles = torch.arange(vectors.shape[1])[:, None] * model.rotary_base**-steps  # [s, hn / 2]
    left, right = vectors[..., :half], vectors[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def feed_forward(
    into: Tensor, weights: Weights, layer: str, model: MoEModelConfig
) -> tuple[Tensor, Tensor]:
    """What a layer adds to [b, s, h], token by token, and its routers' losses."""
    if f"{layer}.mlp.linear_fc1.weight" in weights:
        return swiglu(into, weights, f"{layer}.mlp"), into.new_zeros(())
    own = "decoder.mlp" if "decoder.mlp.router.weight" in weights else f"{layer}.mlp"
    experts, topk = model.num_experts or 0, model.moe_router_topk
    tokens = into.flatten(0, 1)  # [t, h]
    logits = tokens @ weights[f"{own}.router.weight"].T
    scores = logits.softmax(-1)
    counts = torch.zeros(experts, dtype=torch.float64)
    rows = []
    for token, score in zip(tokens, scores, strict=True):
        total = torch.zeros_like(token)
        for expert in score.topk(topk).indices.tolist():
            counts[expert] += 1
            gate, up = weights[f"{own}.experts.weight1"][expert]
            down = weights[f"{own}.experts.weight2"][expert]
            total = total + score[expert] * (down @ (F.silu(gate @ token) * (up @ token)))
        if model.moe_shared_expert_intermediate_size is not None:
            total = total + swiglu(token, weights, f"{own}.shared_experts")
        rows.append(total)
    balance = experts * (counts / (len(tokens) * topk) * scores.mean(0)).sum()
    z_loss = logits.logsumexp(-1).square().mean()
    layers = model.num_layers // model.moe_layer_freq
    return torch.stack(rows).view_as(into), (
        model.moe_aux_loss_coeff * balance / layers
        + model.moe_z_loss_coeff * z_loss / (layers * topk)
    )


def swiglu(rows: Tensor, weights: Weights, own: str) -> Tensor:
    """A dense SwiGLU layer of [..., h]."""
    gate, up = (rows @ weights[f"{own}.linear_fc1.weight"].T).chunk(2, -1)
    return (F.silu(gate) * up) @ weights[f"{own}.linear_fc2.weight"].T
