"""Name published architectures, their dense comparators, and small siblings for tests."""

from collections.abc import Mapping
from typing import Any

_OLMOE_1B_7B: Mapping[str, Any] = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_experts": 64,
    "moe_layer_freq": 1,
    "moe_share_across_layers": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 1024,
    # 50,280 token ids and 24 unused rows, part of the softmax as in the released model.
    "vocab_size": 50304,
    "make_vocab_size_divisible_by": 128,
    "rotary_base": 10000.0,
    "norm_epsilon": 1.0e-5,
    "normalization": "RMSNorm",
    "attention": "full_width_qk_norm",
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "init_method_cutoff": 3.0,
    "router": "softmax_topk",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_loss_convention": "olmoe",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 0.001,
    "moe_expert_capacity_factor": None,
    "moe_token_drop_policy": "probs",
}

_JETMOE_8B: Mapping[str, Any] = {
    "num_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 16,
    "kv_channels": 128,
    "num_experts": 8,
    "moe_layer_freq": 1,
    "moe_share_across_layers": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 5632,
    "moe_output_bias": True,
    "vocab_size": 32000,
    "make_vocab_size_divisible_by": 128,
    "rotary_base": 10000.0,
    # The released code normalises layers with 1e-6, the final one with its config's 1e-5.
    "norm_epsilon": 1.0e-6,
    "final_norm_epsilon": 1.0e-5,
    "normalization": "RMSNorm",
    "attention": "moa",
    "untie_embeddings_and_output_weights": False,
    "init_method_std": 0.01,
    # The released code draws from an untruncated normal, of which 6e-7 lies beyond this.
    "init_method_cutoff": 5.0,
    "router": "topk_softmax",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_loss_convention": "per_layer",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 0.001,
    "moe_expert_capacity_factor": None,
    "moe_token_drop_policy": "probs",
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
    # JetMoE-8B: 8,522,237,952 parameters, 2,331,445,248 of them active per token.
    "jetmoe_8b": _JETMOE_8B,
    # The same blocks at a size that two CPU cores train in minutes.
    "jetmoe_tiny": {
        **_JETMOE_8B,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 32,
        "moe_ffn_hidden_size": 256,
        "vocab_size": 4096,
        # 0.01 suits a width of 2048; at 128 it would make the initial block outputs negligible.
        "init_method_std": 0.02,
    },
}
"""Field values of `config.MoEModelConfig`; a recipe names one as `preset:` and may override
fields."""

PUBLISHED_STEPS: Mapping[str, Mapping[str, int]] = {
    # configs/OLMoE-1B-7B-0924.yml of https://github.com/allenai/OLMoE.
    "olmoe_1b_7b": {"seq_length": 4096, "global_batch_size": 1024},
    # arXiv:2404.07413, section 4.2: 4M tokens a step in sequences of 4,096.
    "jetmoe_8b": {"seq_length": 4096, "global_batch_size": 1024},
}
"""The batch that a preset's authors trained with, as fields of the trainer's `TrainingConfig`. A
preset is an architecture and sets neither; a tool that needs a batch may use these, and says so."""
