"""Fields of config.json that other models or tools have: left out where nothing depends on them."""

import re
from typing import Any

import pytest

from moe_ext.convert import FAMILIES, harmless_fields
from tests.unit.moe_ext.convert.test_config import JETMOE_8B, OLMOE_0924, read

HARMLESS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration_x.X"},
    "layer_types": ["full_attention"] * 3,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "pretraining_tp": 1,
    "resid_pdrop": 0.0,
    "transformers.js_config": {"dtype": "q4"},
    "unsloth_version": "2025.1",
    "use_sliding_window": False,
}
HARMFUL: dict[str, tuple[Any, str]] = {
    "layer_types": (["full_attention", "sliding_attention", "full_attention"], "a list of 'full_"),
    "mlp_only_layers": ([0], "[]"),
    "pretraining_tp": (2, "1"),
    "resid_pdrop": (0.1, "0"),
    "tie_encoder_decoder": (0, "False"),
    "use_sliding_window": (True, "False"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_without_effect_are_named_and_change_nothing(family: str) -> None:
    base = {"model_type": family, "num_hidden_layers": 3}
    assert read({**base, **HARMLESS}) == read(base)
    null = {"sliding_window": None, "mlp_bias": None}
    assert harmless_fields({**base, **HARMLESS, **null, "use_cache": True}) == HARMLESS
    for published in (OLMOE_0924, JETMOE_8B):
        assert harmless_fields(published) == {}


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in HARMFUL])
def test_fields_with_an_effect_are_refused(family: str, name: str) -> None:
    value, needed = HARMFUL[name]
    message = f"{name} is {value!r}; it must be {needed}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read({"model_type": family, "num_hidden_layers": 3, name: value})


def test_kind_of_every_layer_is_compared_with_their_number() -> None:
    kinds = {"layer_types": ["full_attention"] * 3}
    with pytest.raises(ValueError, match=r"^layer_types is .*; it must be a list of"):
        read({"model_type": "olmoe", "num_hidden_layers": 4, **kinds})
    with pytest.raises(ValueError, match=r"^attention_bias is True; it must be False"):
        read({"model_type": "jetmoe", "attention_bias": True})
