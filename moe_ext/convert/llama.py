"""Map names, shapes and config fields of a dense LLaMA (`LlamaForCausalLM`); read only.

Missing fields have the defaults of transformers' `LlamaConfig`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.blocks import (
    head_group_piece,
    layer_piece,
    unstacked_piece,
    vocabulary_pieces,
)
from moe_ext.convert.fields import Fields
from moe_ext.convert.pieces import Piece, all_rows

MODEL_TYPE = "llama"
"""`model_type` of config.json."""


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
    if hf_config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type is {hf_config.get('model_type')!r}; a dense model must be a"
            f" '{MODEL_TYPE}'; convert it to that form, or train a dense model here"
        )
    fields = Fields(hf_config, family=MODEL_TYPE)
    heads = fields.positive_int("num_attention_heads", 32)
    groups = fields.positive_int("num_key_value_heads", heads)
    hidden = fields.positive_int("hidden_size", 4096)
    if hidden % heads == 0:
        fields.must_agree("head_dim", hidden // heads, with_="hidden_size / num_attention_heads")
    fields.must_be("attention_bias", False, why="attention projections have no bias")
    fields.must_be("attention_dropout", 0, 0.0, why="dropout is not supported")
    fields.must_be("hidden_act", "silu", "swish", why="experts are SwiGLU")
    fields.must_be("sliding_window", why="sliding-window attention is not supported")
    model = MoEModelConfig(
        num_layers=fields.positive_int("num_hidden_layers", 32),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        num_experts=None,
        ffn_hidden_size=fields.positive_int("intermediate_size", 11008),
        vocab_size=fields.positive_int("vocab_size", 32000),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=fields.rope_theta(10000.0),
        norm_epsilon=fields.non_negative("rms_norm_eps", 1.0e-6),
        attention="standard",
        untie_embeddings_and_output_weights=not fields.flag("tie_word_embeddings", False),
        init_method_std=fields.non_negative("initializer_range", 0.02),
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model


def make_pieces(model: MoEModelConfig) -> Iterator[Piece]:
    """Yield every block of every native tensor once, in the order of the HF tensors."""
    yield from vocabulary_pieces(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", model
    )
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield unstacked_piece(
        "decoder.final_layernorm.weight", all_rows("model.norm.weight", model.hidden_size)
    )
    if model.untie_embeddings_and_output_weights:
        yield from vocabulary_pieces("output_layer.weight", "lm_head.weight", model)


def _layer(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    native, hf = "decoder.layers", f"model.layers.{layer}"
    stack = {"layer": layer, "num_layers": model.num_layers}
    h, f = model.hidden_size, model.ffn_hidden_size or 0
    ng = model.num_query_groups or model.num_attention_heads
    kv = model.head_size * ng
    for key, name, *shape in (
        ("input_layernorm", "input_layernorm", h),
        ("pre_mlp_layernorm", "post_attention_layernorm", h),
        ("self_attention.linear_proj", "self_attn.o_proj", h, h),
        ("mlp.linear_fc2", "mlp.down_proj", h, f),
    ):
        yield layer_piece(
            f"{native}.{key}.weight", all_rows(f"{hf}.{name}.weight", *shape), **stack
        )
    yield head_group_piece(
        f"{native}.self_attention.linear_qkv.weight",
        (
            all_rows(f"{hf}.self_attn.q_proj.weight", h, h),
            all_rows(f"{hf}.self_attn.k_proj.weight", kv, h),
            all_rows(f"{hf}.self_attn.v_proj.weight", kv, h),
        ),
        num_groups=ng,
        **stack,
    )
    # One group: the rows of gate, then those of up.
    yield head_group_piece(
        f"{native}.mlp.linear_fc1.weight",
        (
            all_rows(f"{hf}.mlp.gate_proj.weight", f, h),
            all_rows(f"{hf}.mlp.up_proj.weight", f, h),
        ),
        num_groups=1,
        **stack,
    )
