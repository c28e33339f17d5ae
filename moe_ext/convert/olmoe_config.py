"""Translate config.json of `OlmoeForCausalLM` to and from MoEModelConfig.

Missing fields have the defaults of transformers' `OlmoeConfig`.
"""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.family import common_problems, plain_problems
from moe_ext.convert.fields import Fields


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the architecture that config.json describes.

    `norm_topk_prob` is the router `topk_softmax`: a softmax over the selected logits is the softmax
    over all of them, renormalised over the selected.

    Args:
        hf_config: the parsed file.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: a field is unknown or has a value that the native model does not support.
    """
    fields = Fields(hf_config, family="olmoe")
    heads = fields.positive_int("num_attention_heads", 16)
    groups = fields.positive_int("num_key_value_heads", heads)
    hidden = fields.positive_int("hidden_size", 2048)
    experts = fields.positive_int("num_experts", fields.positive_int("num_local_experts", 64))
    fields.must_agree("num_local_experts", experts, with_="num_experts")
    if hidden % heads == 0:
        fields.must_agree("head_dim", hidden // heads, with_="hidden_size / num_attention_heads")
    _refuse_unsupported(fields)
    vocab_size = fields.positive_int("vocab_size", 50304)
    model = MoEModelConfig(
        num_layers=fields.positive_int("num_hidden_layers", 16),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        num_experts=experts,
        moe_router_topk=fields.positive_int("num_experts_per_tok", 8),
        moe_ffn_hidden_size=fields.positive_int("intermediate_size", 2048),
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=fields.rope_theta(10000.0),
        norm_epsilon=fields.non_negative("rms_norm_eps", 1.0e-5),
        attention="full_width_qk_norm",
        untie_embeddings_and_output_weights=not fields.flag("tie_word_embeddings", False),
        init_method_std=fields.non_negative("initializer_range", 0.02),
        router="topk_softmax" if fields.flag("norm_topk_prob", False) else "softmax_topk",
        moe_aux_loss_coeff=fields.non_negative("router_aux_loss_coef", 0.01),
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse fields that change the model in a way it does not support."""
    fields.must_be("attention_bias", False, why="attention projections have no bias")
    fields.must_be("attention_dropout", 0, 0.0, why="dropout is not supported")
    fields.must_be("clip_qkv", why="QKV clipping is not supported")
    fields.must_be("hidden_act", "silu", "swish", why="experts are SwiGLU")
    fields.must_be("sliding_window", why="sliding-window attention is not supported")


def own_fields(model: MoEModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that not all families have."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": model.router == "topk_softmax",
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "output_router_logits": False,
        "rms_norm_eps": model.norm_epsilon,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
    }


def conversion_problems(model: MoEModelConfig) -> list[str]:
    """List what prevents `model` from being an OLMoE model, one message per field."""
    found = common_problems(model)
    if model.attention != "full_width_qk_norm":
        found.append(f"attention is '{model.attention}', and OLMoE's is 'full_width_qk_norm'")
    if model.router not in ("softmax_topk", "topk_softmax"):
        found.append(
            f"router is '{model.router}', and OLMoE's is 'softmax_topk' (or 'topk_softmax', its"
            " norm_topk_prob)"
        )
    found += plain_problems(model, family="OLMoE")
    if model.moe_output_bias:
        found.append("moe_output_bias is True, and OLMoE has no bias")
    return found
