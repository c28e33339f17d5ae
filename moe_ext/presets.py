"""Named architectures: the papers' models, their dense comparators, small siblings for tests."""

from collections.abc import Mapping
from typing import Any

_OLMOE_1B_7B: Mapping[str, Any] = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_experts": 64,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 1024,
    "vocab_size": 50280,
    "make_vocab_size_divisible_by": 128,
    "rotary_base": 10000.0,
    "norm_epsilon": 1.0e-5,
    "attention": "full_width_qk_norm",
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "init_method_cutoff": 3.0,
    "router": "softmax_topk",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_loss_convention": "olmoe",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # OLMoE-1B-7B-0924: 6,919,161,856 parameters, 1,282,017,280 of them active per token.
    "olmoe_1b_7b": _OLMOE_1B_7B,
    # The dense model OLMoE is compared with (paper section 4.1.1): no router, no QK-norm.
    "olmoe_1b_7b_dense": {
        **_OLMOE_1B_7B,
        "num_experts": None,
        "ffn_hidden_size": 8192,
        "attention": "standard",
    },
    # The same blocks at a size that two CPU cores train in minutes.
    "olmoe_tiny": {
        **_OLMOE_1B_7B,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "moe_ffn_hidden_size": 64,
        "vocab_size": 4096,
    },
}
"""Field values of `config.MoEModelConfig`; a recipe names one as `preset:` and may override."""
