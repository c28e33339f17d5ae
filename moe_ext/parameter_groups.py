"""Sorts a model's parameters into named groups, which can be frozen or trained at another rate."""

from moe_ext.config import MoEModelConfig

GROUPS = (
    *("embedding", "attention", "router", "experts", "shared_experts"),
    *("mlp", "norm", "head"),
)
"""Every group; `mlp` is dense feed-forward layers."""


def group_of(name: str, model: MoEModelConfig) -> str:
    """Returns the group of a parameter.

    Routers and norms are groups of their own wherever they are; the biases that experts share
    belong to the experts, or to the attention. A head that shares the embedding's weight is part of
    the embedding.

    Args:
        name: of the parameter within its chunk, with or without the prefixes of wrappers.
        model: the architecture.
    """
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norm"
    if "router" in parts:
        return "router"
    if "self_attention" in parts:
        return "attention"
    if "shared_experts" in parts:
        return "shared_experts"
    if "mlp" in parts:
        return "mlp" if {"linear_fc1", "linear_fc2"} & set(parts) else "experts"
    if "output_layer" in parts and model.untie_embeddings_and_output_weights:
        return "head"
    return "embedding"


def groups_of_model(model: MoEModelConfig) -> tuple[str, ...]:
    """Returns the groups that a model of this architecture has, on whatever rank."""
    has_router = model.num_experts is not None or model.attention_experts is not None
    absent = {
        "router": not has_router,
        "experts": model.num_experts is None,
        "shared_experts": model.moe_shared_expert_intermediate_size is None,
        "mlp": not model.has_dense_layers,
        "norm": not model.has_norm_weights,
        "head": not model.untie_embeddings_and_output_weights,
    }
    return tuple(group for group in GROUPS if not absent.get(group, False))
