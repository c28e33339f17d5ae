"""Flags of a small JetMoE, on top of the launcher's tiny model."""

from typing import Any

JETMOE: dict[str, object] = {
    "attention": "moa",
    "moa-num-experts": 5,
    "kv-channels": 10,
    "router": "topk_softmax",
    "moe-output-bias": True,
    "no-untie-embeddings-and-output-weights": True,
    "norm-epsilon": 1e-6,
    "final-norm-epsilon": 1e-5,
    "moe-loss-convention": "per_layer",
    "moe-aux-loss-coeff": 0.02,
    "moe-z-loss-coeff": 0.02,
}
"""JetMoE's blocks: 6 heads in 2 groups for 3 of 5 experts; a layer's two routers differ."""

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "jetmoe": {
        "num_layers": 2,
        "attention": "moa",
        "num_query_groups": 4,
        "num_attention_heads": 12,
        "kv_channels": 8,
        "router": "topk_softmax",
        "moe_output_bias": True,
        "norm_epsilon": 1e-6,
        "no_untie_embeddings_and_output_weights": True,
    },
}
"""Both families, of a size that tensor parallel ranks can share."""
