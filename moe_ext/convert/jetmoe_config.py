"""Translate config.json of `JetMoeForCausalLM` to and from MoEModelConfig.

Missing fields have the defaults of transformers' `JetMoeConfig`.
"""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.family import common_problems
from moe_ext.convert.fields import Fields
from moe_ext.model_fields import MOA

LAYER_NORM_EPSILON = 1.0e-6
"""Epsilon of every norm inside a layer. Every version of transformers builds these norms without
reading the config; `rms_norm_eps` reaches only the final norm."""

_HUB_NAMES = {
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
}
"""The first release's field names -> those of transformers, which ignores the first."""


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the architecture that config.json describes.

    Args:
        hf_config: the parsed file.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: a field is unknown, has a value that the native model does not support, or
            contradicts what transformers reads.
    """
    fields = Fields(hf_config, family="jetmoe")
    sizes = {
        "num_hidden_layers": fields.positive_int("num_hidden_layers", 12),
        "num_local_experts": fields.positive_int("num_local_experts", 8),
        "num_experts_per_tok": fields.positive_int("num_experts_per_tok", 2),
        "intermediate_size": fields.positive_int("intermediate_size", 5632),
    }
    _compare_hub_names(fields, sizes)
    groups, topk = fields.positive_int("num_key_value_heads", 16), sizes["num_experts_per_tok"]
    head_size = fields.positive_int("kv_channels", fields.positive_int("head_dim", 128))
    fields.must_agree("head_dim", head_size, with_="kv_channels")
    fields.must_agree(
        "num_attention_heads", groups * topk, with_="num_key_value_heads x num_experts_per_tok"
    )
    _refuse_unsupported(fields)
    vocab_size = fields.positive_int("vocab_size", 32000)
    final_epsilon = fields.non_negative("rms_norm_eps", 1.0e-6)
    model = MoEModelConfig(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=fields.positive_int("hidden_size", 2048),
        num_attention_heads=groups * topk,
        num_query_groups=groups,
        kv_channels=head_size,
        num_experts=sizes["num_local_experts"],
        moe_router_topk=topk,
        moe_ffn_hidden_size=sizes["intermediate_size"],
        moe_output_bias=True,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=fields.rope_theta(10000.0),
        norm_epsilon=LAYER_NORM_EPSILON,
        final_norm_epsilon=None if final_epsilon == LAYER_NORM_EPSILON else final_epsilon,
        attention=MOA,
        untie_embeddings_and_output_weights=not fields.flag("tie_word_embeddings", True),
        init_method_std=fields.non_negative("initializer_range", 0.01),
        router="topk_softmax",
        moe_aux_loss_coeff=fields.non_negative("aux_loss_coef", 0.01),
        moe_loss_convention="per_layer",
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model


def _compare_hub_names(fields: Fields, sizes: Mapping[str, int]) -> None:
    """Check that fields with the first release's names agree with those transformers reads.

    Raises:
        ValueError: the two differ; transformers would silently build another model.
    """
    for old, new in _HUB_NAMES.items():
        given = fields.take(old)
        if given is not None and given != sizes[new]:
            source = "which is" if fields.has(new) else "which is missing and defaults to"
            raise ValueError(
                f"{old} is {given!r}, but transformers does not know that name: it reads {new},"
                f" {source} {sizes[new]}; set {new} to the right value"
            )


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse fields that change the model in a way it does not support."""
    fields.must_be("activation_function", "silu", "swish", why="experts are SwiGLU")
    fields.must_be("attention_bias", False, why="keys, values and queries have no bias")
    fields.must_be("attention_dropout", 0, 0.0, why="dropout is not supported")
    fields.must_be("bias", True, why="transformers always adds the output biases")
    fields.must_be("hidden_act", "silu", "swish", why="experts are SwiGLU")
    fields.must_be("glu", True, why="experts are SwiGLU")
    fields.must_be("rotary_percent", 1.0, why="partial RoPE is not supported")
    fields.must_be("sliding_window", why="sliding-window attention is not supported")
    fields.take("layer_norm_epsilon")  # no version of transformers reads it


def own_fields(model: MoEModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that not all families have."""
    final_epsilon = model.final_norm_epsilon
    return {
        "activation_function": "silu",
        "architectures": ["JetMoeForCausalLM"],
        "aux_loss_coef": model.moe_aux_loss_coeff,
        "intermediate_size": model.moe_ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "num_experts_per_tok": model.moe_router_topk,
        "num_local_experts": model.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": model.norm_epsilon if final_epsilon is None else final_epsilon,
    }


def conversion_problems(model: MoEModelConfig) -> list[str]:
    """List what prevents `model` from being a JetMoE model, one message per field."""
    if model.attention != MOA:
        return [f"attention is '{model.attention}', and JetMoE's is '{MOA}'"]
    found = common_problems(model)
    for field, value, wanted_field, wanted in (
        ("moa_num_experts", model.attention_experts, "num_experts", model.num_experts),
        ("moa_router_topk", model.attention_topk, "moe_router_topk", model.moe_router_topk),
    ):
        if value != wanted:
            found.append(f"{field} is {value}, and JetMoE's is {wanted_field} ({wanted})")
    if model.router != "topk_softmax":
        found.append(f"router is '{model.router}', and JetMoE's is 'topk_softmax'")
    if not model.moe_output_bias:
        found.append("moe_output_bias is False, and JetMoE has that bias")
    if model.norm_epsilon != LAYER_NORM_EPSILON:
        found.append(
            f"norm_epsilon is {model.norm_epsilon}, and transformers computes JetMoE's layers with"
            f" {LAYER_NORM_EPSILON} whatever its config says"
        )
    return found
