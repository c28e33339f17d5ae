"""config.json of `JetMoeForCausalLM` <-> MoEModelConfig.

Defaults are those of transformers' `JetMoeConfig`, which are what a missing field means.
"""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MOA, MoEModelConfig
from moe_ext.convert.family import TokenIds, common_problems
from moe_ext.convert.fields import Fields

LAYER_NORM_EPSILON = 1.0e-6
"""Epsilon of every norm inside a layer. transformers, every version of it, builds these norms
without a word of the config; `rms_norm_eps` reaches the final norm alone."""

_HUB_NAMES = {
    "moe_num_experts": "num_local_experts",
    "moe_top_k": "num_experts_per_tok",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
}
"""The first release's spelling -> transformers', which does not know the first."""


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """The architecture that config.json describes.

    Args:
        hf_config: the parsed file.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: a field is unknown, has a value that the native model has not, or says what
            transformers would not go by.
    """
    fields = Fields(hf_config, family="jetmoe")
    sizes = {
        "num_hidden_layers": fields.size("num_hidden_layers", 12),
        "num_local_experts": fields.size("num_local_experts", 8),
        "num_experts_per_tok": fields.size("num_experts_per_tok", 2),
        "intermediate_size": fields.size("intermediate_size", 5632),
    }
    _compare_hub_names(fields, sizes)
    groups, topk = fields.size("num_key_value_heads", 16), sizes["num_experts_per_tok"]
    head_size = fields.size("kv_channels", fields.size("head_dim", 128))
    fields.must_agree("head_dim", head_size, with_="kv_channels")
    fields.must_agree(
        "num_attention_heads", groups * topk, with_="num_key_value_heads x num_experts_per_tok"
    )
    _refuse_what_we_lack(fields)
    vocab_size = fields.size("vocab_size", 32000)
    final_epsilon = fields.number("rms_norm_eps", 1.0e-6)
    model = MoEModelConfig(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=fields.size("hidden_size", 2048),
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
        init_method_std=fields.number("initializer_range", 0.01),
        router="topk_softmax",
        moe_aux_loss_coeff=fields.number("aux_loss_coef", 0.01),
        moe_loss_convention="per_layer",
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model


def _compare_hub_names(fields: Fields, sizes: Mapping[str, int]) -> None:
    """Accept the first release's spelling only where it says what transformers goes by.

    Raises:
        ValueError: it says something else; transformers would build another model without a word.
    """
    for old, new in _HUB_NAMES.items():
        given = fields.take(old)
        if given is not None and given != sizes[new]:
            source = "which is" if fields.has(new) else "which is missing and so means"
            raise ValueError(
                f"{old} is {given!r}, but transformers does not know that name: it goes by {new},"
                f" {source} {sizes[new]}; write the right number under the name {new}"
            )


def _refuse_what_we_lack(fields: Fields) -> None:
    fields.must_be("activation_function", "silu", "swish", why="experts are SwiGLU here")
    fields.must_be("attention_dropout", 0, 0.0, why="nothing is dropped out here")
    fields.must_be("bias", True, why="transformers always adds the output biases")
    fields.must_be("glu", True, why="experts are SwiGLU here")
    fields.must_be("rotary_percent", 1.0, why="RoPE turns every channel of a head here")
    fields.must_be("sliding_window", why="attention reaches back over the whole sequence here")
    fields.take("layer_norm_epsilon")  # read by no version of transformers


def write_config(
    model: MoEModelConfig,
    *,
    max_position_embeddings: int,
    dtype: str,
    bos_token_id: TokenIds,
    eos_token_id: TokenIds,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """The contents of config.json, in the spelling of transformers 4 and of 5.

    Args:
        model: what to describe.
        max_position_embeddings: longest sequence, in tokens.
        dtype: of the weights on disk, "float32" or "bfloat16".
        bos_token_id: begins a sequence; 1 for JetMoE's tokenizer.
        eos_token_id: ends one; 2 for JetMoE's tokenizer.
        pad_token_id: fills one up; JetMoE has none.

    Raises:
        ValueError: JetMoE cannot express the model; the message names the field.
    """
    problems = expression_problems(model)
    if problems:
        raise ValueError(f"jetmoe cannot express this model: {'; '.join(problems)}")
    final_epsilon = model.final_norm_epsilon
    return {
        "activation_function": "silu",
        "architectures": ["JetMoeForCausalLM"],
        "attention_dropout": 0.0,
        "aux_loss_coef": model.moe_aux_loss_coeff,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.moe_ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "max_position_embeddings": max_position_embeddings,
        "model_type": "jetmoe",
        "num_attention_heads": model.num_attention_heads,
        "num_experts_per_tok": model.moe_router_topk,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "num_local_experts": model.num_experts,
        "output_router_logits": False,
        "pad_token_id": pad_token_id,
        "rms_norm_eps": model.norm_epsilon if final_epsilon is None else final_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def expression_problems(model: MoEModelConfig) -> list[str]:
    """What keeps `model` from being a JetMoE model, one message a field; empty when nothing."""
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
