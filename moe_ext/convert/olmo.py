"""Map names, shapes and config fields of the dense OLMo (`OlmoForCausalLM`).

Missing fields have the defaults of transformers' `OlmoConfig`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert import dense
from moe_ext.convert.family import Family, TokenIds
from moe_ext.convert.fields import Fields
from moe_ext.convert.pieces import ExpertLayout, Piece

MODEL_TYPE = "olmo"
"""`model_type` of config.json."""

_NORM_EPSILON = 1.0e-5
"""Of every norm; config.json does not have it."""


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the dense architecture that config.json describes.

    Args:
        hf_config: the parsed file.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: a field is unknown or has a value that the native model does not support.
    """
    fields = Fields(hf_config, family=MODEL_TYPE)
    heads = fields.positive_int("num_attention_heads", 32)
    groups = fields.positive_int("num_key_value_heads", heads)
    hidden = fields.positive_int("hidden_size", 4096)
    if hidden % heads == 0:
        fields.must_agree("head_dim", hidden // heads, with_="hidden_size / num_attention_heads")
    fields.must_be("attention_bias", False, why="attention projections have no bias")
    fields.must_be("attention_dropout", 0, 0.0, why="dropout is not supported")
    fields.must_be("clip_qkv", why="QKV clipping is not supported")
    fields.must_be("hidden_act", "silu", "swish", why="feed-forward layers are SwiGLU")
    fields.must_be("sliding_window", why="sliding-window attention is not supported")
    model = MoEModelConfig(
        num_layers=fields.positive_int("num_hidden_layers", 32),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        num_experts=None,
        ffn_hidden_size=fields.positive_int("intermediate_size", 11008),
        vocab_size=fields.positive_int("vocab_size", 50304),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=fields.rope_theta(10000.0),
        normalization="NonParametricLayerNorm",
        norm_epsilon=_NORM_EPSILON,
        attention="standard",
        untie_embeddings_and_output_weights=not fields.flag("tie_word_embeddings", False),
        init_method_std=fields.non_negative("initializer_range", 0.02),
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model


def write_config(
    model: MoEModelConfig,
    *,
    max_position_embeddings: int,
    dtype: str,
    bos_token_id: TokenIds,
    eos_token_id: TokenIds,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """Return the contents of config.json, in the spelling of transformers 4 and of 5.

    Args:
        model: what to describe.
        max_position_embeddings: longest sequence, in tokens.
        dtype: of the weights on disk, "float32" or "bfloat16".
        bos_token_id: begins a sequence; OLMo has none.
        eos_token_id: ends one; 50279 for OLMo's tokenizer.
        pad_token_id: fills one up; 1 for OLMo's tokenizer.

    Raises:
        ValueError: OLMo cannot express the model; the message names the field.
    """
    problems = conversion_problems(model)
    if problems:
        raise ValueError(f"{MODEL_TYPE} cannot express this model: {'; '.join(problems)}")
    return {
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "clip_qkv": None,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "model_type": MODEL_TYPE,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "pad_token_id": pad_token_id,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def conversion_problems(model: MoEModelConfig) -> list[str]:
    """List what prevents `model` from being an OLMo model, one message per field."""
    if model.num_experts is not None:
        return [f"num_experts is {model.num_experts}, and OLMo is dense"]
    head_size = model.hidden_size / model.num_attention_heads
    fields: tuple[tuple[str, object, object], ...] = (
        ("normalization", model.normalization, "NonParametricLayerNorm"),
        ("norm_epsilon", model.norm_epsilon, _NORM_EPSILON),
        ("attention", model.attention, "standard"),
    )
    found = [
        f"{name} is {value!r}, and OLMo's is {wanted!r}"
        for name, value, wanted in fields
        if value != wanted
    ]
    final = model.final_norm_epsilon
    if final is not None and final != model.norm_epsilon:
        found.append(
            f"final_norm_epsilon is {final}, and OLMo's is norm_epsilon ({model.norm_epsilon})"
        )
    if model.kv_channels is not None and model.kv_channels != head_size:
        found.append(
            f"kv_channels is {model.kv_channels}, and OLMo's is hidden_size / num_attention_heads"
            f" = {head_size:g}"
        )
    return found


def _make_pieces(model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
    del layout  # there is one
    return dense.make_pieces(model)


OLMO = Family(
    name=MODEL_TYPE,
    layouts=("dense",),
    expert_names={"dense": "model.layers.0.mlp.gate_proj.weight"},
    problems=conversion_problems,
    model_config=read_config,
    hf_config=write_config,
    make_pieces=_make_pieces,
)
