"""Map Hugging Face models to native ones: names, shapes, pure transforms and config, by family.

No file is read or written here: see `megatron.trainer.hf_files` and `moe_app.convert`.
"""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert import llama
from moe_ext.convert.family import Family, ReadConfig
from moe_ext.convert.fields import harmless_fields
from moe_ext.convert.jetmoe import JETMOE
from moe_ext.convert.olmo import OLMO
from moe_ext.convert.olmoe import OLMOE
from moe_ext.convert.pieces import ExpertLayout, Piece, Slice

FAMILIES: dict[str, Family] = {"olmoe": OLMOE, "jetmoe": JETMOE, "olmo": OLMO}
"""What `model_type` of config.json can name."""

DENSE_CONFIGS: dict[str, ReadConfig] = {"llama": llama.read_config, "olmo": OLMO.model_config}
"""What `model_type` of a dense model to upcycle can name; all have the pieces of `dense`."""

_OTHERS = {
    "hf_olmo": "OLMo's form before transformers had one; take the model whose name ends in -hf",
    "olmo2": "other than OLMo 1, its norms follow attention and feed-forward, and have weights",
    "olmo3": "other than OLMo 1, its norms follow attention and feed-forward, and have weights",
}
"""Forms that are taken for one of ours, and what is different."""


def family_from_config(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        ValueError: `model_type` is missing or names no family we have.
    """
    model_type = hf_config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"model_type is {_described(model_type)}; it must be one of {', '.join(sorted(FAMILIES))},"
        " the families that can be converted"
    )


def dense_config(
    hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
) -> MoEModelConfig:
    """Return the architecture of a dense Hugging Face model, of those that can be upcycled.

    Args:
        hf_config: the parsed config.json.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this; 1 pads nothing.

    Raises:
        ValueError: it is none of them, or has a feature that the native model does not support.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DENSE_CONFIGS:
        raise ValueError(
            f"model_type is {_described(model_type)}; a dense model must be one of"
            f" {', '.join(sorted(DENSE_CONFIGS))}; convert it to such a form, or train a dense"
            " model here"
        )
    read = DENSE_CONFIGS[model_type]
    return read(hf_config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)


def _described(model_type: object) -> str:
    """Return a model_type with what is known of it."""
    known = _OTHERS.get(model_type) if isinstance(model_type, str) else None
    return f"{model_type!r}" if known is None else f"{model_type!r} ({known})"


def family_for_model(model: MoEModelConfig) -> Family:
    """Return the family whose Hugging Face form can express a native model.

    Raises:
        ValueError: there is none; the message names the fields that keep each family from it.
    """
    reasons = []
    for name, family in FAMILIES.items():
        problems = family.problems(model)
        if not problems:
            return family
        reasons.append(f"{name}: {'; '.join(problems)}")
    raise ValueError(f"no Hugging Face family can express this model. {'. '.join(reasons)}")


__all__ = [
    "DENSE_CONFIGS",
    "FAMILIES",
    "ExpertLayout",
    "Family",
    "Piece",
    "Slice",
    "dense_config",
    "family_for_model",
    "family_from_config",
    "harmless_fields",
]
