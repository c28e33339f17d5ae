"""Map names, shapes and config fields of JetMoE (`JetMoeForCausalLM`).

There is one layout, "fused": the Hub and every version of transformers store all experts of a
layer in one tensor. Rows of a query expert are in the order of the key and value heads in both
forms, so the heads need no reordering; only keys and values, which the Hub stores one after the
other, are interleaved head by head.
"""

from collections.abc import Iterator

from moe_ext.config import MoEModelConfig
from moe_ext.convert.blocks import (
    EXPERTS,
    expert_pieces,
    head_group_piece,
    layer_piece,
    model_pieces,
)
from moe_ext.convert.family import Family
from moe_ext.convert.jetmoe_config import conversion_problems, own_fields, read_config
from moe_ext.convert.pieces import ExpertLayout, Piece, Slice, all_rows


def make_pieces(model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
    """Yield every block of every native tensor once, in the order of the HF tensors."""
    del layout  # there is one

    def of_layer(layer: int) -> Iterator[Piece]:
        yield from _norms(model, layer)
        yield from _attention(model, layer)
        yield from _experts(model, layer)

    return model_pieces(model, of_layer)


def _norms(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    """Yield the pieces of one layer's norms."""
    for key, name in (
        ("input_layernorm", "input_layernorm"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
    ):
        source = all_rows(f"model.layers.{layer}.{name}.weight", model.hidden_size)
        key = f"decoder.layers.{key}.weight"
        yield layer_piece(key, source, layer=layer, num_layers=model.num_layers)


def _attention(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    """Yield the pieces of one layer's mixture of attention heads."""
    native, hf = "decoder.layers.self_attention", f"model.layers.{layer}.self_attention"
    at = {"layer": layer, "num_layers": model.num_layers}
    h, e = model.hidden_size, model.attention_experts or 0
    ng = model.num_query_groups or model.num_attention_heads
    width = ng * (model.kv_channels or 0)
    yield layer_piece(f"{native}.output_bias", all_rows(f"{hf}.experts.bias", h), **at)
    for key, name, shape in (
        ("weight_q", "input_linear", (width, h)),
        ("weight_o", "output_linear", (h, width)),
    ):
        yield from expert_pieces(
            f"{native}.experts.{key}",
            f"{hf}.experts.{name}.weight",
            layer=layer,
            stack=(model.num_layers, e),
            hf_shape=shape,
            shape=shape,
        )
    router = all_rows(f"{hf}.experts.router.layer.weight", e, h)
    yield layer_piece(f"{native}.router.weight", router, **at)
    name, shape = f"{hf}.kv_proj.weight", (2 * width, h)
    yield head_group_piece(
        f"{native}.linear_kv.weight",
        (
            Slice(name=name, shape=shape, start=0, count=width),  # keys
            Slice(name=name, shape=shape, start=width, count=width),  # values
        ),
        num_groups=ng,
        **at,
    )


def _experts(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    """Yield the pieces of one layer's feed-forward experts."""
    native, hf = "decoder.layers.mlp", f"model.layers.{layer}.mlp"
    at = {"layer": layer, "num_layers": model.num_layers}
    h, f, e = model.hidden_size, model.moe_ffn_hidden_size, model.num_experts or 0
    yield layer_piece(f"{native}.output_bias", all_rows(f"{hf}.bias", h), **at)
    for key, name, hf_shape, shape in (
        ("weight1", "input_linear", (2 * f, h), (2, f, h)),
        ("weight2", "output_linear", (h, f), (h, f)),
    ):
        yield from expert_pieces(
            f"{EXPERTS}.{key}",
            f"{hf}.{name}.weight",
            layer=layer,
            stack=(model.num_layers, e),
            hf_shape=hf_shape,
            shape=shape,
        )
    router = all_rows(f"{hf}.router.layer.weight", e, h)
    yield layer_piece(f"{native}.router.weight", router, **at)


JETMOE = Family(
    name="jetmoe",
    layouts=("fused",),
    expert_names={"fused": "model.layers.0.mlp.input_linear.weight"},
    problems=conversion_problems,
    model_config=read_config,
    own_fields=own_fields,
    make_pieces=make_pieces,
    attention="self_attention",
)
