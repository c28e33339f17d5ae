"""Map names and shapes of dense models that differ in their norms: LLaMA and OLMo."""

from collections.abc import Iterator
from functools import partial

from moe_ext.config import MoEModelConfig
from moe_ext.convert.blocks import head_group_piece, layer_piece, model_pieces, qkv_piece
from moe_ext.convert.pieces import Piece, all_rows


def make_pieces(model: MoEModelConfig) -> Iterator[Piece]:
    """Yield every block of every native tensor once, in the order of the HF tensors."""
    return model_pieces(model, partial(_layer, model))


def _layer(model: MoEModelConfig, layer: int) -> Iterator[Piece]:
    native, hf = "decoder.layers", f"model.layers.{layer}"
    stack = {"layer": layer, "num_layers": model.num_layers}
    h, f = model.hidden_size, model.ffn_hidden_size or 0
    matrices: list[tuple[str, str, tuple[int, ...]]] = [
        ("self_attention.linear_proj", "self_attn.o_proj", (h, h)),
        ("mlp.linear_fc2", "mlp.down_proj", (h, f)),
    ]
    if model.has_norm_weights:
        matrices = [
            ("input_layernorm", "input_layernorm", (h,)),
            ("pre_mlp_layernorm", "post_attention_layernorm", (h,)),
            *matrices,
        ]
    for key, name, shape in matrices:
        yield layer_piece(
            f"{native}.{key}.weight", all_rows(f"{hf}.{name}.weight", *shape), **stack
        )
    yield qkv_piece(model, layer)
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
