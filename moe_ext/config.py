"""The model: the fields people vary, and their translation to megatron-core's TransformerConfig."""

from dataclasses import dataclass
from typing import Literal

Convention = Literal["olmoe", "per_layer"]
"""How a paper's auxiliary-loss coefficients are meant; see `functional.layer_coefficients`."""


@dataclass(frozen=True, kw_only=True)
class MoEModelConfig:
    """A decoder-only language model with mixture-of-experts feed-forward layers.

    Names are Megatron's where Megatron has one. Letters in brackets are those of docs/glossary.md.
    """

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream (h)."""
    num_attention_heads: int = 4
    """Query heads (np)."""
    num_query_groups: int | None = None
    """Key/value heads (ng); None means as many as query heads."""
    kv_channels: int | None = None
    """Size of one head (hn); None means hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Feed-forward width of a dense model; used when num_experts is None."""
    num_experts: int | None = 64
    """Experts per layer (e); None builds a dense SwiGLU model."""
    moe_router_topk: int = 8
    """Experts per token (k)."""
    moe_ffn_hidden_size: int = 64
    """Width of one expert (f)."""
    vocab_size: int = 4096
    """Token ids the tokenizer can produce (v)."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this, whatever the tensor parallel size."""
    rotary_base: float = 10000.0
    """RoPE's theta."""
    norm_epsilon: float = 1.0e-5
    """Epsilon of every RMSNorm."""
    qk_norm: Literal["full_width", "none"] = "full_width"
    """full_width: one RMSNorm over all heads of q, one over all of k (OLMoE)."""
    untie_embeddings_and_output_weights: bool = True
    """Give the output layer a matrix of its own."""
    init_method_std: float = 0.02
    """Standard deviation of every initial matrix, before truncation."""
    init_method_cutoff: float = 3.0
    """Initial weights are redrawn beyond this many standard deviations (OLMoE: 3)."""
    router: str = "softmax_topk"
    """Routing rule, a name in moe_ext.routers.ROUTERS."""
    moe_router_dtype: Literal["fp32"] | None = None
    """Precision of the router's matrix product; None means the model's own."""
    moe_aux_loss_coeff: float = 0.01
    """Load-balancing loss coefficient as the paper states it (alpha)."""
    moe_z_loss_coeff: float = 0.001
    """Router z-loss coefficient as the paper states it (beta)."""
    moe_loss_convention: Convention = "olmoe"
    """What those two coefficients multiply; the run prints what each layer gets."""
    expert_backend: str = "grouped"
    """Expert compute, a name in moe_ext.experts.EXPERT_BACKENDS."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """megatron-core's token dispatcher."""
