"""Define and validate the model's fields, and derive sizes from them."""

from dataclasses import dataclass
from typing import Literal

Convention = Literal["olmoe", "per_layer"]
"""How a paper defines its auxiliary-loss coefficients; see `functional.layer_coefficients`."""

MOA = "moa"
"""The attention whose query and output projections are experts; see `attention.moa`."""

_TRAINING_ONLY = (
    "expert_backend",
    "init_method_cutoff",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_loss_convention",
    "moe_router_dtype",
    "moe_token_dispatcher_type",
    "moe_z_loss_coeff",
)


@dataclass(frozen=True, kw_only=True)
class MoEModelConfig:
    """Configures a decoder-only language model with mixture-of-experts feed-forward layers.

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
    """Feed-forward width of a dense model; used when num_experts is None."""
    num_experts: int | None = 64
    """Experts per layer (e); None builds a dense SwiGLU model."""
    moe_router_topk: int = 8
    """Experts per token (k)."""
    moe_ffn_hidden_size: int = 64
    """Width of one expert (f)."""
    moe_output_bias: bool = False
    """Add one ungated bias [h], shared by all experts, to their sum (JetMoE)."""
    vocab_size: int = 4096
    """Token ids the tokenizer can produce (v)."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this, independent of the tensor parallel size."""
    rotary_base: float = 10000.0
    """RoPE's theta."""
    norm_epsilon: float = 1.0e-5
    """Epsilon of every RMSNorm, except a final one that sets its own."""
    final_norm_epsilon: float | None = None
    """Epsilon of the RMSNorm before the output layer; None means norm_epsilon."""
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
    init_method_cutoff: float = 3.0
    """Truncate initial weights at this many standard deviations (OLMoE: 3)."""
    router: str = "softmax_topk"
    """Routing rule, a name in moe_ext.routers.ROUTERS."""
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
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """megatron-core's token dispatcher."""

    @property
    def attention_experts(self) -> int | None:
        """Return the experts of each layer's self-attention; None if it has no experts."""
        if self.attention != MOA:
            return None
        return self.num_experts if self.moa_num_experts is None else self.moa_num_experts

    @property
    def attention_topk(self) -> int:
        """Return the experts per token of a moa attention."""
        return self.moe_router_topk if self.moa_router_topk is None else self.moa_router_topk

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

    def problems(self) -> list[str]:
        """Return what is wrong with the architecture itself, one message each; empty if valid."""
        found = self._size_problems()
        if not found:
            found += self._attention_problems()
            found += self._expert_problems()
        return found + self._range_problems()

    def layout_problems(
        self,
        *,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        virtual_stages: int,
        expert_model_parallel_size: int,
        expert_tensor_parallel_size: int,
        sequence_parallel: bool,
        seq_length: int,
        is_training: bool = True,
    ) -> list[str]:
        """Return what prevents this parallel layout, one message each; empty if valid.

        Args:
            tensor_model_parallel_size: ranks per attention or embedding matrix, at least 1.
            pipeline_model_parallel_size: stages, at least 1.
            virtual_stages: model chunks per pipeline rank, at least 1.
            expert_model_parallel_size: ranks per layer's experts, at least 1.
            expert_tensor_parallel_size: ranks per expert, at least 1.
            sequence_parallel: whether activations are split along the sequence.
            seq_length: tokens per sequence (s).
            is_training: whether backward passes will run.
        """
        tensor = ("tensor_model_parallel_size", tensor_model_parallel_size)
        pairs = [("num_attention_heads", self.num_attention_heads, *tensor)]
        if self.num_query_groups is not None:
            pairs.append(("num_query_groups", self.num_query_groups, *tensor))
        if sequence_parallel:
            pairs.append(("seq_length", seq_length, *tensor))
        if self.num_experts is None:
            pairs.append(("ffn_hidden_size", self.ffn_hidden_size or 0, *tensor))
        else:
            expert = ("expert_model_parallel_size", expert_model_parallel_size)
            expert_tensor = ("expert_tensor_parallel_size", expert_tensor_parallel_size)
            pairs.append(("num_experts", self.num_experts, *expert))
            pairs.append(("moe_ffn_hidden_size", self.moe_ffn_hidden_size, *expert_tensor))
        found = [message for pair in pairs for message in _divisibility_problems(*pair)]
        found += self._chunk_problems(pipeline_model_parallel_size, virtual_stages)
        if self.padded_vocab_size % tensor_model_parallel_size:
            found.append(
                f"the padded vocabulary ({self.padded_vocab_size}, vocab_size"
                f" {self.vocab_size} rounded up) must be a multiple of tensor_model_parallel_size"
                f" ({tensor_model_parallel_size}); set make_vocab_size_divisible_by"
                f" ({self.make_vocab_size_divisible_by}) to a multiple of it"
            )
        if self.num_experts is None and expert_model_parallel_size > 1:
            found.append(
                f"expert_model_parallel_size ({expert_model_parallel_size}) must be 1 for a dense"
                " model (num_experts None); set it to 1, or set num_experts"
            )
        is_split = tensor_model_parallel_size > 1 and is_training
        if self.num_experts is not None and is_split and not sequence_parallel:
            found.append(
                f"sequence_parallel (False) must be on when a model with num_experts"
                f" ({self.num_experts}) has tensor_model_parallel_size"
                f" ({tensor_model_parallel_size}) above 1, or megatron-core refuses to train; drop"
                " --no-sequence-parallel, or use a tensor parallel size of 1"
            )
        return found

    def _size_problems(self) -> list[str]:
        sizes: dict[str, int | None] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_experts": self.num_experts,
            "moe_router_topk": self.moe_router_topk,
            "moa_num_experts": self.moa_num_experts,
            "moa_router_topk": self.moa_router_topk,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            "vocab_size": self.vocab_size,
            "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
        }
        return [
            f"{name} ({size}) must be at least 1; use a positive number"
            for name, size in sizes.items()
            if size is not None and size < 1
        ]

    def _attention_problems(self) -> list[str]:
        if self.attention == MOA:
            return self._moa_problems()
        found = [
            f"{name} ({value}) is set, but attention is '{self.attention}'; set attention to"
            f" '{MOA}', or {name} to None"
            for name, value in (
                ("moa_num_experts", self.moa_num_experts),
                ("moa_router_topk", self.moa_router_topk),
            )
            if value is not None
        ]
        heads, head_size = self.num_attention_heads, self.kv_channels
        source = "kv_channels"
        if head_size is None:
            source = "hidden_size / num_attention_heads"
            if self.hidden_size % heads:
                found.append(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads"
                    f" ({heads}) when kv_channels is not set; use a hidden size of"
                    f" {_nearest_multiples(self.hidden_size, heads)}, or set kv_channels"
                )
            else:
                head_size = self.hidden_size // heads
        if head_size is not None:
            found += _head_size_problems(source, head_size)
        groups = self.num_query_groups
        if groups is not None:
            found += _divisibility_problems(
                "num_attention_heads", heads, "num_query_groups", groups
            )
        return found

    def _moa_problems(self) -> list[str]:
        experts, topk = self.attention_experts, self.attention_topk
        if experts is None:
            return [
                f"moa_num_experts (None) must be set when attention is '{MOA}' and num_experts is"
                " None; set the experts of the attention, or another attention"
            ]
        found = []
        if topk > experts:
            found.append(
                f"the experts per token of the attention (moa_router_topk {self.moa_router_topk},"
                f" moe_router_topk {self.moe_router_topk}: {topk}) must be at most its experts"
                f" ({experts}); use a moa_router_topk of 1 to {experts}"
            )
        heads = self.num_attention_heads
        groups = heads if self.num_query_groups is None else self.num_query_groups
        if heads != groups * topk:
            found.append(
                f"num_attention_heads ({heads}) must be num_query_groups x the experts per token of"
                f" the attention ({groups} x {topk}) when attention is '{MOA}', because each chosen"
                " expert brings one query head for each key/value head; use num_attention_heads"
                f" {groups * topk}"
            )
        if self.kv_channels is None:
            found.append(
                f"kv_channels (None) must be set when attention is '{MOA}', whose heads count once"
                " for each chosen expert; set the size of a head, for example hidden_size /"
                f" num_query_groups = {self.hidden_size / groups:g}"
            )
        else:
            found += _head_size_problems("kv_channels", self.kv_channels)
        return found

    def _expert_problems(self) -> list[str]:
        if self.num_experts is None and self.moe_output_bias:
            return [
                "moe_output_bias (True) needs experts, but num_experts is None; set it to False, or"
                " set num_experts"
            ]
        if self.num_experts is None:
            if self.ffn_hidden_size is not None:
                return []
            return [
                "ffn_hidden_size (None) must be set when num_experts is None, which is a dense"
                " model; set the feed-forward width, or set num_experts"
            ]
        if self.moe_router_topk <= self.num_experts:
            return []
        return [
            f"moe_router_topk ({self.moe_router_topk}) must be at most num_experts"
            f" ({self.num_experts}); use 1 to {self.num_experts} experts per token"
        ]

    def _range_problems(self) -> list[str]:
        positive = {
            "rotary_base": self.rotary_base,
            "norm_epsilon": self.norm_epsilon,
            "final_norm_epsilon": self.final_norm_epsilon,
            "init_method_std": self.init_method_std,
            "init_method_cutoff": self.init_method_cutoff,
        }
        not_negative = {
            "moe_aux_loss_coeff": self.moe_aux_loss_coeff,
            "moe_z_loss_coeff": self.moe_z_loss_coeff,
        }
        found = [
            f"{name} ({value}) must be above 0; use a positive number"
            for name, value in positive.items()
            if value is not None and not value > 0
        ]
        return found + [
            f"{name} ({value}) must not be negative; use 0 to switch the loss off"
            for name, value in not_negative.items()
            if not value >= 0
        ]

    def _chunk_problems(self, stages: int, virtual_stages: int) -> list[str]:
        chunks = stages * virtual_stages
        if self.num_layers % chunks == 0:
            return []
        return [
            f"num_layers ({self.num_layers}) must be a multiple of pipeline_model_parallel_size x"
            f" num_virtual_stages_per_pipeline_rank ({stages} x {virtual_stages} = {chunks}); use"
            f" {_nearest_multiples(self.num_layers, chunks)} layers, or other sizes whose product"
            f" is {_divisors(self.num_layers)}"
        ]


def _head_size_problems(source: str, head_size: int) -> list[str]:
    if head_size % 2 == 0:
        return []
    return [
        f"the size of a head ({source} = {head_size}) must be even, because RoPE rotates its"
        f" channels in pairs; use a head size of {_nearest_multiples(head_size, 2)}"
    ]


def _divisibility_problems(name: str, value: int, divisor_name: str, divisor: int) -> list[str]:
    if value % divisor == 0:
        return []
    return [
        f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}); use"
        f" {divisor_name} {_divisors(value)}"
    ]


def _divisors(number: int) -> str:
    """Format the divisors of `number` >= 1 as a choice: "1, 2, 3 or 6"."""
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


def _nearest_multiples(number: int, step: int) -> str:
    """Format the multiples of `step` next to a `number` that is none, without 0: "99 or 102"."""
    below = number - number % step
    return f"{below} or {below + step}" if below else f"{step}"
