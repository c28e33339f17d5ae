"""Map names, shapes and config fields of OLMoE (`OlmoeForCausalLM`).

Layouts: "per-expert" is what every release on the Hub has and what transformers writes; "fused"
is how transformers 5 holds the weights in memory, `gate_up_proj` [e, 2f, h] and `down_proj`
[e, h, f], and what it writes with `save_original_format=False`.
"""

from collections.abc import Iterator

from moe_ext.config import MoEModelConfig
from moe_ext.convert.blocks import (
    EXPERTS,
    expert_piece,
    expert_pieces,
    gate_up_piece,
    layer_piece,
    model_pieces,
    qkv_piece,
)
from moe_ext.convert.family import Family
from moe_ext.convert.olmoe_config import conversion_problems, own_fields, read_config
from moe_ext.convert.pieces import ExpertLayout, Piece, all_rows


def make_pieces(model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
    """Yield every block of every native tensor once, in the order of the HF tensors."""

    def of_layer(layer: int) -> Iterator[Piece]:
        yield from _attention(model, layer)
        yield from _experts(model, layer, layout)

    return model_pieces(model, of_layer)


def _attention(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    """Yield the pieces of one layer's norms and attention."""
    native, hf = "decoder.layers", f"model.layers.{layer}"
    stack = {"layer": layer, "num_layers": model.num_layers}
    h = model.hidden_size
    kv = model.head_size * (model.num_query_groups or model.num_attention_heads)
    for key, name, *shape in (
        ("input_layernorm", "input_layernorm", h),
        ("pre_mlp_layernorm", "post_attention_layernorm", h),
        ("self_attention.q_norm", "self_attn.q_norm", h),
        ("self_attention.k_norm", "self_attn.k_norm", kv),
        ("self_attention.linear_proj", "self_attn.o_proj", h, h),
    ):
        source = all_rows(f"{hf}.{name}.weight", *shape)
        yield layer_piece(f"{native}.{key}.weight", source, **stack)
    yield qkv_piece(model, layer)


def _experts(model: MoEModelConfig, layer: int, layout: ExpertLayout) -> Iterator[Piece]:
    """Yield the pieces of one layer's router and experts."""
    hf = f"model.layers.{layer}.mlp"
    h, f, e = model.hidden_size, model.moe_ffn_hidden_size, model.num_experts or 0
    yield layer_piece(
        "decoder.layers.mlp.router.weight",
        all_rows(f"{hf}.gate.weight", e, h),
        layer=layer,
        num_layers=model.num_layers,
    )
    stack = (model.num_layers, e)
    if layout == "fused":
        yield from expert_pieces(
            f"{EXPERTS}.weight1",
            f"{hf}.experts.gate_up_proj",
            layer=layer,
            stack=stack,
            hf_shape=(2 * f, h),
            shape=(2, f, h),
        )
        yield from expert_pieces(
            f"{EXPERTS}.weight2",
            f"{hf}.experts.down_proj",
            layer=layer,
            stack=stack,
            hf_shape=(h, f),
            shape=(h, f),
        )
        return
    for expert in range(e):
        at, own = (layer, expert), f"{hf}.experts.{expert}"
        yield gate_up_piece(
            (all_rows(f"{own}.gate_proj.weight", f, h), all_rows(f"{own}.up_proj.weight", f, h)),
            at=at,
            stack=stack,
        )
        down = all_rows(f"{own}.down_proj.weight", h, f)
        yield expert_piece(f"{EXPERTS}.weight2", down, at=at, stack=stack, shape=(h, f))


OLMOE = Family(
    name="olmoe",
    layouts=("per-expert", "fused"),
    expert_names={
        "per-expert": "model.layers.0.mlp.experts.0.gate_proj.weight",
        "fused": "model.layers.0.mlp.experts.gate_up_proj",
    },
    problems=conversion_problems,
    model_config=read_config,
    own_fields=own_fields,
    make_pieces=make_pieces,
)
