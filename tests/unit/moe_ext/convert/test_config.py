"""Compare config.json and MoEModelConfig: published files, transformers' own reading, refusals."""

import json
import math
import re
from typing import Any

import pytest
from transformers import JetMoeConfig, OlmoConfig, OlmoeConfig, PreTrainedConfig

from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES, family_from_config
from moe_ext.presets import PRESETS

# As on the Hub, except the class names (transformers 4.43, September 2024).
OLMOE_0924: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
# The release's own spelling (2024), part of which transformers' class does not know.
JETMOE_8B: dict[str, Any] = {
    "activation_function": "silu",
    "architectures": ["JetMoEForCausalLM"],
    "aux_loss_coef": 0.01,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_hidden_size": 5632,
    "glu": True,
    "hidden_size": 2048,
    "initializer_range": 0.01,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 4096,
    "model_type": "jetmoe",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "n_positions": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "num_layers": 24,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rotary_percent": 1.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
CLASSES: dict[str, type[PreTrainedConfig]] = {
    "olmoe": OlmoeConfig,
    "jetmoe": JetMoeConfig,
    "olmo": OlmoConfig,
}
ODD: dict[str, dict[str, Any]] = {
    "olmoe": {
        "hidden_size": 42,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_experts": 5,
        "num_experts_per_tok": 4,
        "intermediate_size": 9,
        "num_hidden_layers": 3,
        "vocab_size": 77,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.5},
        "rms_norm_eps": 3e-4,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
        "initializer_range": 0.07,
        "router_aux_loss_coef": 0.3,
    },
    "jetmoe": {
        "hidden_size": 42,
        "num_key_value_heads": 3,
        "kv_channels": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 4,
        "intermediate_size": 9,
        "num_hidden_layers": 3,
        "vocab_size": 77,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.5},
        "rms_norm_eps": 3e-4,
        "tie_word_embeddings": False,
        "initializer_range": 0.07,
        "aux_loss_coef": 0.3,
    },
    "olmo": {
        "hidden_size": 42,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 9,
        "num_hidden_layers": 3,
        "vocab_size": 77,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.5},
        "tie_word_embeddings": True,
        "initializer_range": 0.07,
    },
}


def read(config: dict[str, Any]) -> MoEModelConfig:
    return family_from_config(config).model_config(config)


def written(family: str, model: MoEModelConfig) -> dict[str, Any]:
    config = FAMILIES[family].hf_config(
        model,
        max_position_embeddings=99,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=[5, 6],
        pad_token_id=1,
    )
    return dict(json.loads(json.dumps(config)))


def test_olmoe_1b_7b_config_gives_the_preset() -> None:
    assert read(OLMOE_0924) == MoEModelConfig(**PRESETS["olmoe_1b_7b"])


def test_jetmoe_8b_config_gives_the_preset() -> None:
    preset = MoEModelConfig(**PRESETS["jetmoe_8b"])
    assert read(JETMOE_8B).architecture() == preset.architecture()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["to_dict", "to_diff_dict"])
def test_configs_written_by_transformers_are_read(family: str, form: str) -> None:
    config = CLASSES[family](**ODD[family])
    model = read(getattr(config, form)())
    assert model.num_layers == 3
    assert model.rotary_base == 123.5
    assert (model.vocab_size, model.padded_vocab_size) == (77, 128)
    assert model.untie_embeddings_and_output_weights is (family == "jetmoe")
    assert model.num_query_groups == (3 if family == "jetmoe" else 1)
    assert (model.norm_epsilon, model.final_norm_epsilon, model.router) == {
        "olmoe": (3e-4, None, "topk_softmax"),
        "jetmoe": (1e-6, 3e-4, "topk_softmax"),
        "olmo": (1e-5, None, "softmax_topk"),
    }[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(family: str) -> None:
    assert read({"model_type": family}) == read(CLASSES[family]().to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_rope_spellings_are_equivalent(family: str) -> None:
    four = read({"model_type": family, "rope_theta": 500000, "rope_scaling": None})
    five = {"rope_type": "default", "rope_theta": 500000}
    assert four == read({"model_type": family, "rope_parameters": five})
    assert four.rotary_base == 500000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_is_read_back_by_us_and_by_transformers(family: str) -> None:
    theirs = CLASSES[family](**ODD[family])
    model = read(theirs.to_dict())
    config = written(family, model)
    assert read(config) == model
    loaded = CLASSES[family].from_dict(config)
    for field in ODD[family]:
        assert getattr(loaded, field) == getattr(theirs, field), field
    assert (loaded.max_position_embeddings, loaded.eos_token_id, loaded.pad_token_id) == (
        99,
        [5, 6],
        1,
    )
    assert str(loaded.dtype) == "torch.bfloat16"
    assert config["rope_theta"] == 123.5  # transformers 4


def test_first_jetmoe_release_names_must_agree_with_current_ones() -> None:
    for old, value, new, default in (
        ("moe_num_experts", 16, "num_local_experts", 8),
        ("moe_top_k", 3, "num_experts_per_tok", 2),
        ("ffn_hidden_size", 100, "intermediate_size", 5632),
    ):
        message = (
            f"{old} is {value}, but transformers does not know that name: it reads {new}, which"
            f" is missing and defaults to {default}; set {new} to the right value"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            read({"model_type": "jetmoe", old: value})
    read({"model_type": "jetmoe", "moe_num_experts": 16, "num_local_experts": 16})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo", {"clip_qkv": 8.0}, "clip_qkv is 8.0; it must be null: QKV clipping is not"),
    ("olmo", {"rms_norm_eps": 1e-5}, "fields that olmo models are not known to have: rms_norm_eps"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; it must be null: QKV clipping is not"),
    ("olmoe", {"attention_bias": True}, "attention_bias is True; it must be False: attention"),
    ("olmoe", {"attention_dropout": 0.1}, "attention_dropout is 0.1; it must be 0 or 0.0: dropout"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu' or 'swish':"),
    ("jetmoe", {"activation_function": "gelu"}, "activation_function is 'gelu'; it must be 'silu'"),
    ("olmoe", {"sliding_window": 4096}, "sliding_window is 4096; it must be null: sliding-window"),
    (
        "olmoe",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling has type 'linear'; rope_type must be 'default'",
    ),
    (
        "jetmoe",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_parameters has rope_type 'yarn'; rope_type must be 'default'",
    ),
    (
        "olmoe",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters has full_attention {'rope_type': 'default'}; rope_type must be",
    ),
    (
        "olmoe",
        {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0},
        "rope_theta is 6.0, but rope_theta in rope_parameters is 5.0; transformers reads the",
    ),
    ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1.0"),
    ("jetmoe", {"rotary_percent": 0.5}, "rotary_percent is 0.5; it must be 1.0"),
    ("jetmoe", {"bias": False}, "bias is False; it must be True: transformers always adds"),
    ("jetmoe", {"glu": False}, "glu is False; it must be True"),
    (
        "jetmoe",
        {"num_attention_heads": 16},
        "num_attention_heads is 16, but num_key_value_heads x num_experts_per_tok is 32",
    ),
    ("olmoe", {"head_dim": 64}, "head_dim is 64, but hidden_size / num_attention_heads is 128"),
    ("jetmoe", {"num_layers": 24}, "num_layers is 24, but transformers does not know that name"),
    ("olmoe", {"num_experts": "64"}, "num_experts is '64'; it must be an integer of at least"),
    ("olmoe", {"num_experts": True}, "num_experts is True; it must be an integer of at least"),
    ("olmoe", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a finite number of"),
    ("olmoe", {"rms_norm_eps": math.inf}, "rms_norm_eps is inf; it must be a finite number of"),
    ("olmoe", {"rope_theta": 10**400}, "rope_theta is 1000"),
    ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
    ("olmoe", {"num_experts_per_tok": 65}, "moe_router_topk (65) must be at most num_experts (64)"),
    (
        "olmoe",
        {"shared_expert": True, "quantization_config": {"bits": 4}, "unset": None},
        "config.json has fields that olmoe models are not known to have: quantization_config,"
        " shared_expert; each may change what the model computes; remove those that do not",
    ),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_unsupported_fields_are_refused(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read({"model_type": family, **fields})


@pytest.mark.parametrize("model_type", ["mixtral", None, ["olmoe"]])
def test_unknown_family_is_refused_listing_known_ones(model_type: Any) -> None:
    message = f"model_type is {model_type!r}; it must be one of jetmoe, olmo, olmoe, the families"
    with pytest.raises(ValueError, match=re.escape(message)):
        family_from_config({"model_type": model_type})
