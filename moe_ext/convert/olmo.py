"""Map names, shapes and config fields of the dense OLMo (`OlmoForCausalLM`)."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert import dense
from moe_ext.convert.dense_config import read_dense_config
from moe_ext.convert.family import Family, plain_problems
from moe_ext.convert.fields import Fields
from moe_ext.convert.pieces import ExpertLayout, Piece

MODEL_TYPE = "olmo"
"""`model_type` of config.json."""

_FIXED = {
    "normalization": "NonParametricLayerNorm",
    "norm_epsilon": 1.0e-5,  # config.json does not have it
    "attention": "standard",
}
"""What every OLMo has."""


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the dense architecture that config.json describes; see `read_dense_config`."""
    return read_dense_config(
        hf_config,
        family=MODEL_TYPE,
        vocab_size=50304,
        read_own=_read_own,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )


def _read_own(fields: Fields) -> Mapping[str, Any]:
    fields.must_be("clip_qkv", why="QKV clipping is not supported")
    return {name: _FIXED[name] for name in ("normalization", "norm_epsilon")}


def own_fields(model: MoEModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that not all families have."""
    return {
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "intermediate_size": model.ffn_hidden_size,
    }


def conversion_problems(model: MoEModelConfig) -> list[str]:
    """List what prevents `model` from being an OLMo model, one message per field."""
    if model.num_experts is not None:
        return [f"num_experts is {model.num_experts}, and OLMo is dense"]
    found = [
        f"{name} is {value!r}, and OLMo's is {wanted!r}"
        for name, wanted in _FIXED.items()
        if (value := getattr(model, name)) != wanted
    ]
    return found + plain_problems(model, family="OLMo")


def _make_pieces(model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
    del layout  # there is one
    return dense.make_pieces(model)


OLMO = Family(
    name=MODEL_TYPE,
    layouts=("dense",),
    expert_names={"dense": "model.layers.0.mlp.gate_proj.weight"},
    problems=conversion_problems,
    model_config=read_config,
    own_fields=own_fields,
    make_pieces=_make_pieces,
)
