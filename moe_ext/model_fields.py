"""Define the model's fields, and derive sizes from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Convention = Literal["olmoe", "per_layer"]
"""How a paper defines its auxiliary-loss coefficients; see `functional.layer_coefficients`."""

MOA = "moa"
"""The attention whose query and output projections are experts; see `attention.moa`."""

BalancingLoss = Literal["aux_loss", "seq_aux_loss", "global_aux_loss"]
"""Over which tokens the load-balancing loss counts; see docs/routing.md."""
DropPolicy = Literal["probs", "position"]
"""Which assignments an expert beyond its capacity drops; see docs/routing.md."""

EXPERT_CHOICE = ("expert_choice", "expert_choice_grouped")
"""The routers of which experts choose tokens, not tokens experts."""

_TRAINING_ONLY = (
    "expert_backend",
    "fused_kernels",
    "init_method_cutoff",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_loss_convention",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_token_drop_policy",
    "moe_token_dispatcher_type",
    "moe_z_loss_coeff",
)

_ADDED: Mapping[str, object] = {
    "normalization": "RMSNorm",
    "moe_layer_freq": 1,
    "moe_share_across_layers": False,
    "moe_router_enable_expert_bias": False,
}
"""Fields of the architecture that earlier versions did not have, and what their models were."""


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """Holds the fields of a decoder-only language model with mixture-of-experts layers.

    Names are Megatron's where Megatron has one. Letters in brackets are those of docs/glossary.md.
    """

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream (h)."""
    num_attention_heads: int = 4
    """Query heads (np)."""
    num_query_groups: int | None = None
    """Key/value heads (ng); None means the number of query heads."""
    kv_channels: int | None = None
    """Size of one head (hn); None means hidden_size / num_attention_heads; required for moa
    attention."""
    ffn_hidden_size: int | None = None
    """Width of dense feed-forward layers: of a dense model's, and of those that moe_layer_freq
    leaves dense."""
    num_experts: int | None = 64
    """Experts per layer (e); None builds a dense SwiGLU model."""
    moe_layer_freq: int = 1
    """Every how many layers one has experts: the last of each so many, as OLMo's moe_interleave,
    where 2 leaves the first layer, the third and so on dense. Megatron-LM has the first of each."""
    moe_share_across_layers: bool = False
    """Have one feed-forward of experts, router included, in all layers that have experts."""
    moe_router_topk: int = 8
    """Experts per token (k)."""
    moe_ffn_hidden_size: int = 64
    """Width of one expert (f)."""
    moe_output_bias: bool = False
    """Add one ungated bias [h], shared by all experts, to their sum (JetMoE)."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of an expert that every token has, without a gate, beside those it is routed to; the
    summed width of several. None means none."""
    vocab_size: int = 4096
    """Token ids the tokenizer can produce (v)."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this, independent of the tensor parallel size."""
    rotary_base: float = 10000.0
    """RoPE's theta."""
    normalization: Literal["RMSNorm", "NonParametricLayerNorm"] = "RMSNorm"
    """Every norm of the model, those of queries and keys too: RMSNorm with a weight, or LayerNorm
    without weight and bias (OLMo)."""
    norm_epsilon: float = 1.0e-5
    """Epsilon of every norm, except a final one that sets its own."""
    final_norm_epsilon: float | None = None
    """Epsilon of the norm before the output layer; None means norm_epsilon."""
    attention: str = "full_width_qk_norm"
    """Self-attention, a name in moe_ext.attention.ATTENTIONS (OLMoE: full_width_qk_norm; JetMoE:
    moa, a mixture of attention heads)."""
    moa_num_experts: int | None = None
    """Experts of a moa attention; None means num_experts."""
    moa_router_topk: int | None = None
    """Experts per token of a moa attention; None means moe_router_topk."""
    untie_embeddings_and_output_weights: bool = True
    """Give the output layer its own matrix."""
    init_method_std: float = 0.02
    """Standard deviation of every initial matrix, before truncation."""
    init_method_cutoff: float | None = 3.0
    """Truncate initial weights at this many standard deviations (OLMoE: 3); None draws from the
    whole normal distribution."""
    router: str = "softmax_topk"
    """Routing rule, a name in moe_ext.routers.ROUTERS."""
    moe_router_load_balancing_type: BalancingLoss = "aux_loss"
    """Tokens over which the load-balancing loss is taken: aux_loss, the micro-batch; seq_aux_loss,
    each sequence; global_aux_loss, counted over the global batch so far (docs/routing.md)."""
    moe_router_enable_expert_bias: bool = False
    """Balance without a loss: a bias for each expert, that selects and does not weigh
    (arXiv 2408.15664)."""
    moe_router_bias_update_rate: float = 0.001
    """What that bias moves by after each step, toward the mean load."""
    moe_expert_capacity_factor: float | None = None
    """An expert's capacity in training, as a multiple of the mean load; assignments beyond it are
    dropped. None drops nothing."""
    moe_token_drop_policy: DropPolicy = "probs"
    """Which assignments are kept: those of the largest gates, or the first in the sequences."""
    moe_router_dtype: Literal["fp32"] | None = None
    """Precision of the router's matrix product; None means the model's own."""
    moe_aux_loss_coeff: float = 0.01
    """Load-balancing loss coefficient as the paper states it (alpha)."""
    moe_z_loss_coeff: float = 0.001
    """Router z-loss coefficient as the paper states it (beta)."""
    moe_loss_convention: Convention = "olmoe"
    """What those two coefficients multiply; the run logs the value per layer."""
    expert_backend: str = "auto"
    """Expert compute: a name in moe_ext.experts.EXPERT_BACKENDS, or auto, which picks the best
    known for device, precision and sizes, and logs the choice and the reason."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """Whether head, norms, routers and SwiGLU may compute in kernels of Triton on a GPU; off leaves
    all of it to torch. The experts' products have expert_backend."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """megatron-core's token dispatcher. flex sends tokens by DeepEP's kernels: it needs GPUs, the
    package deep_ep, and experts or parts of them on several ranks."""

    @property
    def is_moa(self) -> bool:
        """Return whether the attention's projections are experts."""
        return self.attention == MOA

    @property
    def is_expert_choice(self) -> bool:
        """Return whether experts choose tokens: a token's experts depend on later tokens."""
        return self.router in EXPERT_CHOICE

    @property
    def has_varying_experts(self) -> bool:
        """Return whether tokens can have other numbers of experts than k."""
        return self.is_expert_choice or self.moe_expert_capacity_factor is not None

    @property
    def attention_experts(self) -> int | None:
        """Return the experts of each layer's self-attention; None if it has no experts."""
        if not self.is_moa:
            return None
        return self.num_experts if self.moa_num_experts is None else self.moa_num_experts

    @property
    def attention_topk(self) -> int:
        """Return the experts per token of a moa attention."""
        return self.moe_router_topk if self.moa_router_topk is None else self.moa_router_topk

    def has_experts(self, layer_number: int) -> bool:
        """Return whether the feed-forward of a layer, counted from 1, has experts."""
        return self.num_experts is not None and layer_number % self.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        """Return the layers whose feed-forward has experts."""
        return 0 if self.num_experts is None else self.num_layers // self.moe_layer_freq

    @property
    def has_dense_layers(self) -> bool:
        """Return whether some layer's feed-forward is dense."""
        return self.num_moe_layers < self.num_layers

    @property
    def has_norm_weights(self) -> bool:
        """Return whether norms have parameters."""
        return self.normalization == "RMSNorm"

    @property
    def head_size(self) -> int:
        """Return the width of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def expert_widths(self, *, tensor: int, expert_tensor: int) -> tuple[int, ...]:
        """Return the row widths of the matrix products in a rank's experts; empty without experts.

        Args:
            tensor: ranks per attention matrix, at least 1.
            expert_tensor: ranks per expert, at least 1.
        """
        widths = []
        if self.num_experts is not None:
            widths.append(self.moe_ffn_hidden_size // expert_tensor)
        if self.attention_experts is not None:
            groups = self.num_query_groups or self.num_attention_heads
            widths.append(groups * (self.kv_channels or 0) // tensor)
        return (self.hidden_size, *widths) if widths else ()

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of the embedding and the output layer: the vocabulary, padded."""
        step = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // step) * step

    def architecture(self) -> dict[str, object]:
        """Return the fields that determine the weights and what they compute.

        The others may differ between a checkpoint and the run that continues it.
        """
        return {name: value for name, value in vars(self).items() if name not in _TRAINING_ONLY}

    def addable(self, saved: Mapping[str, object]) -> Mapping[str, str]:
        """Return settings that weights of another run can get, and what their own are called.

        Args:
            saved: flat config of the run that wrote the weights.
        """
        name = "moe_router_enable_expert_bias"
        is_new = self.moe_router_enable_expert_bias and not saved.get(name, _ADDED[name])
        return {name: "expert_bias"} if is_new else {}

    def before_added(self) -> Mapping[str, object]:
        """Return what fields were, in effect, in runs of the versions that lacked them."""
        return _ADDED
