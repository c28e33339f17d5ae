"""Make tiny Hugging Face checkpoints with random weights, for tests of the converter."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_ext.convert import FAMILIES, ExpertLayout

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe",
        "hidden_size": 48,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "olmo": {
        "model_type": "olmo",
        "hidden_size": 48,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "jetmoe": {
        "model_type": "jetmoe",
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "kv_channels": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}
_IDS = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 1}


def make_hf(
    path: Path,
    family: str,
    form: ExpertLayout,
    *,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a checkpoint; return its directory and its weights."""
    path.mkdir(parents=True)
    config = {**CONFIGS[family], **_IDS, **changes}
    (path / "config.json").write_text(json.dumps(config))
    weights = hf_weights(family, form, dtype, changes)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path, weights


def hf_weights(
    family: str, form: ExpertLayout, dtype: torch.dtype, changes: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Draw random tensors for every name the checkpoint must hold."""
    found = FAMILIES[family]
    model = found.model_config({**CONFIGS[family], **changes})
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in found.hf_tensors(model, form).items()
    }
