"""Translate config.json of a dense LLaMA (`LlamaForCausalLM`) to MoEModelConfig."""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.dense_config import read_dense_config
from moe_ext.convert.fields import Fields

MODEL_TYPE = "llama"
"""`model_type` of config.json."""


def read_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the dense architecture that config.json describes; see `read_dense_config`."""
    return read_dense_config(
        hf_config,
        family=MODEL_TYPE,
        vocab_size=32000,
        read_own=_read_own,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )


def _read_own(fields: Fields) -> Mapping[str, Any]:
    return {"norm_epsilon": fields.non_negative("rms_norm_eps", 1.0e-6)}
