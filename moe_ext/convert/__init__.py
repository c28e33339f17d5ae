"""Map Hugging Face models to native ones: names, shapes, pure transforms and config, by family.

No file is read or written here: see `megatron.trainer.hf_files` and `moe_app.convert`.
"""

from collections.abc import Mapping
from typing import Any

from moe_ext.config import MoEModelConfig
from moe_ext.convert.family import Family
from moe_ext.convert.fields import harmless_fields
from moe_ext.convert.jetmoe import JETMOE
from moe_ext.convert.olmoe import OLMOE
from moe_ext.convert.pieces import ExpertLayout, Piece, Slice

FAMILIES: dict[str, Family] = {"olmoe": OLMOE, "jetmoe": JETMOE}
"""What `model_type` of config.json can name."""


def family_from_config(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        ValueError: `model_type` is missing or names no family we have.
    """
    model_type = hf_config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"model_type is {model_type!r}; it must be one of {', '.join(sorted(FAMILIES))}, the"
        " families that can be converted"
    )


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
    "FAMILIES",
    "ExpertLayout",
    "Family",
    "Piece",
    "Slice",
    "family_for_model",
    "family_from_config",
    "harmless_fields",
]
