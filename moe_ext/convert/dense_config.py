"""Translate config.json of dense models that differ in their norms to MoEModelConfig.

Missing fields have the defaults of transformers, the same for LLaMA and OLMo but for what is given.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.fields import Fields


def read_dense_config(
    hf_config: Mapping[str, Any],
    *,
    family: str,
    vocab_size: int,
    read_own: Callable[[Fields], Mapping[str, Any]],
    make_vocab_size_divisible_by: int,
) -> MoEModelConfig:
    """Return the dense architecture that config.json describes.

    Args:
        hf_config: the parsed file.
        family: its `model_type`.
        vocab_size: where the file has none.
        read_own: reads fields of this family alone, of the norms among them; returns ours.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: a field is unknown or has a value that the native model does not support.
    """
    fields = Fields(hf_config, family=family)
    heads = fields.positive_int("num_attention_heads", 32)
    groups = fields.positive_int("num_key_value_heads", heads)
    hidden = fields.positive_int("hidden_size", 4096)
    if hidden % heads == 0:
        fields.must_agree("head_dim", hidden // heads, with_="hidden_size / num_attention_heads")
    fields.must_be("attention_bias", False, why="attention projections have no bias")
    fields.must_be("attention_dropout", 0, 0.0, why="dropout is not supported")
    fields.must_be("hidden_act", "silu", "swish", why="feed-forward layers are SwiGLU")
    fields.must_be("sliding_window", why="sliding-window attention is not supported")
    model = MoEModelConfig(
        num_layers=fields.positive_int("num_hidden_layers", 32),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        num_experts=None,
        ffn_hidden_size=fields.positive_int("intermediate_size", 11008),
        vocab_size=fields.positive_int("vocab_size", vocab_size),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        rotary_base=fields.rope_theta(10000.0),
        attention="standard",
        untie_embeddings_and_output_weights=not fields.flag("tie_word_embeddings", False),
        init_method_std=fields.non_negative("initializer_range", 0.02),
        **read_own(fields),
    )
    fields.finish()
    problems = model.problems()
    if problems:
        raise ValueError("; ".join(problems))
    return model
