"""Compute the bytes a micro-batch keeps from its forward to its backward pass, from configs alone.

Every function lists the bytes of one rank by purpose, counted by storage as an allocator does: a
saved view keeps its whole base tensor. Of torch's functions only the norms keep other bytes on a
GPU than on a CPU; fused kernels keep less (`Step.fused_kernels`).
`tests/distributed/test_plan_measured.py` compares all of it with what autograd saves.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_ext.cost.memory import expert_activation_bytes
from moe_ext.cost.param_shards import Chunk, head_widths
from moe_ext.cost.rank import Batch, Rank
from moe_ext.kernels.rms_norm import WIDEST
from moe_ext.kernels.router_choice import MOST_EXPERTS

_FP32, _INT64, _BOOL = 4, 8, 1


@dataclass(frozen=True, kw_only=True)
class Step(Batch):
    """Describes a training step, with the settings that memory depends on besides traffic."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """How `recompute` "full" picks layers."""
    recompute_num_layers: int = 1
    """uniform: layers per recomputed unit; block: recomputed layers per chunk, one at a time."""
    recompute_core_attention: bool = False
    """Whether core attention is recomputed in backward."""
    keeps_activation: bool = False
    """Whether the expert backend saves more than tokens and projections (`ExpertBackend`)."""
    converts_bf16: bool = False
    """Whether bf16 matrix products are computed in fp32, as on a CPU without bf16 instructions."""
    fused_kernels: bool = False
    """Whether fused kernels compute where they can, as on GPUs that have them."""
    has_positions: bool = False
    """Whether each sequence of a micro-batch has position ids of its own."""
    has_mask: bool = False
    """Whether an explicit attention mask separates documents."""
    is_varlen: bool = False
    """Whether variable-length attention does; on a GPU in bf16 one kernel for all documents."""


@dataclass(frozen=True, kw_only=True)
class StepRank(Rank):
    """Adds to a rank the step settings that memory depends on."""

    batch: Step


class KeptBytes(NamedTuple):
    """Counts the bytes kept for one purpose."""

    part: str
    """The purpose."""
    num_bytes: float
    """Bytes; fractional where routing is unbalanced."""


def total_bytes(items: Iterable[KeptBytes]) -> float:
    """Sum the bytes of all items."""
    return sum(item.num_bytes for item in items)


def bytes_by_part(items: Iterable[KeptBytes]) -> dict[str, float]:
    """Sum the bytes of the items by purpose."""
    found: dict[str, float] = {}
    for item in items:
        found[item.part] = found.get(item.part, 0.0) + item.num_bytes
    return found


def holds_all_experts(rank: StepRank) -> bool:
    """Return whether the rank holds every expert of a layer whole, so that no token leaves it."""
    return rank.layout.expert * rank.layout.expert_tensor == 1


def layer(rank: StepRank) -> Iterator[KeptBytes]:
    """List what one layer keeps, recomputing only the parts that the step names."""
    yield from attention_layer(rank)
    if rank.model.num_experts is None:
        yield from dense_layer(rank)
    elif rank.batch.recompute == "moe":
        yield from norm(rank)
        yield KeptBytes("experts", rank.own_tokens * rank.model.hidden_size * rank.width)
    else:
        yield from norm(rank)
        yield from experts_layer(rank, experts=rank.model.num_experts)


def layer_bytes(rank: StepRank) -> float:
    """Return the bytes that one layer keeps."""
    return total_bytes(layer(rank))


def norm(rank: StepRank) -> Iterator[KeptBytes]:
    """List what the norm of the hidden states keeps, without its output; see `_norm_size`."""
    of_input = _FP32 if rank.batch.device_type == "cpu" else rank.width
    size = _norm_size(rank, rank.model.hidden_size, of_input)
    yield KeptBytes("norms", rank.own_tokens * size)


def _norm_size(rank: StepRank, width: int, of_input: int) -> int:
    """Return the bytes that a norm keeps of a vector, whose elements it keeps in `of_input` bytes.

    It keeps the input (converted to fp32 on a CPU) and its root mean square. For its weight RMSNorm
    keeps the normalized input; LayerNorm, which has none, keeps the mean. A kernel makes the
    normalized input again.
    """
    if _norms_in_kernels(rank, width):
        return width * min(of_input, rank.width) + _FP32
    if rank.model.has_norm_weights:
        return width * (of_input + rank.width) + _FP32
    return width * of_input + 2 * _FP32


def _norms_in_kernels(rank: StepRank, width: int) -> bool:
    """Return whether a kernel computes a norm of this rank over vectors it holds whole."""
    return rank.batch.fused_kernels and rank.model.has_norm_weights and width <= WIDEST


def _rotates_in_kernels(rank: StepRank) -> bool:
    """Return whether a kernel normalises and rotates queries and keys, where they are."""
    is_whole = rank.model.attention == "full_width_qk_norm" and rank.layout.tensor == 1
    return is_whole and _norms_in_kernels(rank, max(head_widths(rank.model)))


def attention_layer(rank: StepRank) -> Iterator[KeptBytes]:
    """List what self-attention keeps, with the norm before it."""
    yield from norm(rank)
    yield KeptBytes("attention", rank.own_tokens * rank.model.hidden_size * rank.width)
    if rank.model.attention_experts is not None:
        yield from _moa(rank, experts=rank.model.attention_experts)
        return
    model, tensor = rank.model, rank.layout.tensor
    queries, keys = (width // tensor for width in head_widths(model))
    # Values are a view of the fused QKV output, unless they are gathered.
    keeps_qkv_output = rank.layout.context == 1
    if model.attention == "full_width_qk_norm":
        yield from _qk_norm(rank, widths=(queries, keys))
        keeps_qkv_output |= _norms_keep_views(rank)
    if keeps_qkv_output:
        yield KeptBytes("attention", rank.tokens * (queries + 2 * keys) * rank.width)
    yield from _core_attention(rank, queries=queries, keys=keys)


def _qk_norm(rank: StepRank, *, widths: tuple[int, int]) -> Iterator[KeptBytes]:
    """List what the query and key norms keep, as `norm`; across TP ranks nothing is converted."""
    if _rotates_in_kernels(rank):
        yield KeptBytes("norms", rank.tokens * len(widths) * _FP32)
        return
    of_input = _FP32 if _converts_norm_inputs(rank) else rank.width
    if _norms_keep_views(rank):
        of_input = 0
    for width in widths:
        yield KeptBytes("norms", rank.tokens * _norm_size(rank, width, of_input))


def _norms_keep_views(rank: StepRank) -> bool:
    """Return whether the query and key norms save views: all heads of the rank are one group.

    The kernels read heads between others.
    """
    if _rotates_in_kernels(rank):
        return True
    groups = rank.model.num_query_groups or rank.model.num_attention_heads
    return groups == rank.layout.tensor and not _converts_norm_inputs(rank)


def _converts_norm_inputs(rank: StepRank) -> bool:
    """Return whether the query and key norms convert their inputs to fp32."""
    return rank.layout.tensor == 1 and rank.batch.device_type == "cpu" and rank.batch.bf16


def _core_attention(rank: StepRank, *, queries: int, keys: int) -> Iterator[KeptBytes]:
    """List rotated queries and keys and the attention output; values are counted by the caller.

    Args:
        rank: the rank.
        queries: width of this rank's query heads.
        keys: width of its key heads.
    """
    model, width, tokens = rank.model, rank.width, rank.tokens
    head_size = model.head_size
    # cos and sin of each angle, once for queries and once for keys; kernels keep half of each.
    angles = head_size // 2 if _rotates_in_kernels(rank) else head_size
    yield KeptBytes("attention", 4 * rotary_rows(rank) * angles * width)
    yield KeptBytes("attention", tokens * queries * width)
    if rank.layout.context == 1:
        yield KeptBytes("attention", tokens * keys * width)
    else:
        all_tokens = rank.batch.seq_length * rank.batch.micro_batch_size
        yield KeptBytes("attention", all_tokens * 2 * keys * width)
    found = tokens * queries * width
    if rank.batch.recompute_core_attention:
        yield KeptBytes("attention", found)
        return
    heads = model.num_attention_heads // rank.layout.tensor
    yield KeptBytes("attention", found + tokens * heads * _FP32)  # and the sums of exponentials
    yield from _copies(rank, found=found, keys=tokens * keys * width)
    if rank.batch.has_mask:
        yield KeptBytes("attention", rank.batch.micro_batch_size * _mask_entries(rank) * width)
    elif rank.layout.context > 1 and rank.batch.device_type == "cpu" and not rank.batch.is_varlen:
        yield KeptBytes("attention", _mask_entries(rank) * width)  # GPU kernels need no mask


def _copies(rank: StepRank, *, found: int, keys: int) -> Iterator[KeptBytes]:
    """List what is kept twice, of what was `found`, of the queries, as large, and of `keys`."""
    is_cuda, is_split = rank.batch.device_type == "cuda", rank.layout.context > 1
    if is_split or (is_cuda and not rank.batch.bf16):
        yield KeptBytes("attention", found)  # chunks concatenated, or transposed
    elif rank.batch.is_varlen and not (is_cuda and rank.batch.micro_batch_size == 1):
        yield KeptBytes("attention", found)  # documents concatenated, or rows transposed
        if is_cuda:
            yield KeptBytes("attention", found + 2 * keys)  # rows, for the kernel


def _mask_entries(rank: StepRank) -> int:
    """Count the entries of an explicit mask per sequence: this rank's queries times visible keys.

    Under context parallelism a rank has an early and a late chunk of queries, each with the keys up
    to its end.
    """
    if rank.layout.context == 1:
        return rank.batch.seq_length**2
    chunks = 2 * rank.layout.context
    return (rank.batch.seq_length // chunks) ** 2 * (chunks + 1)


def rotary_rows(rank: StepRank) -> int:
    """Return the rows of rotary angles: one per position where all sequences count alike."""
    rows = rank.batch.micro_batch_size if rank.batch.has_positions else 1
    return rank.batch.seq_length // rank.layout.context * rows


def _moa(rank: StepRank, *, experts: int) -> Iterator[KeptBytes]:
    """List what moa keeps; the rank holds all experts, with some heads of each."""
    model, width, tokens = rank.model, rank.width, rank.tokens
    topk, keys = model.attention_topk, head_widths(model)[1] // rank.layout.tensor
    # Sequence parallel ranks gather each other's gates.
    yield from router(rank, experts=experts, topk=topk, shared=0 if rank.is_split else _FP32)
    if rank.is_split:
        yield KeptBytes("attention", tokens * model.hidden_size * width)
    rows = tokens * topk
    yield KeptBytes("attention", experts * _INT64)  # tokens per expert
    yield KeptBytes("attention", rows * (3 * _INT64 + _FP32))  # row indices and gates
    if rank.batch.keeps_activation:
        yield KeptBytes("attention", rows * model.hidden_size * width)  # tokens, one row per slot
    if rank.layout.context == 1:
        yield KeptBytes("attention", tokens * 2 * keys * width)  # keys and values in one tensor
    yield from _core_attention(rank, queries=topk * keys, keys=keys)
    yield KeptBytes("attention", rows * keys * width)  # gated


def router(rank: StepRank, *, experts: int, topk: int, shared: int) -> Iterator[KeptBytes]:
    """List what logits, probabilities and both auxiliary losses keep.

    Args:
        rank: the rank.
        experts: e.
        topk: k.
        shared: bytes a slot of the selection from kernels that the caller counts.
    """
    tokens, model = rank.own_tokens, rank.model
    if model.moe_router_dtype == "fp32" and rank.width < _FP32:
        yield KeptBytes("router", (tokens + experts) * model.hidden_size * _FP32)
    if _routes_in_kernels(rank, experts=experts):
        # Probabilities, log-sum-exp; the losses' slopes and sum; the selection and its weights.
        yield KeptBytes("router", (tokens * (experts + 1) + experts + 2) * _FP32)
        yield KeptBytes("router", tokens * topk * (_INT64 + _FP32 - shared))
        return
    # Probabilities, logits, their log-sum-exp; each expert's share, and the loss.
    yield KeptBytes("router", (tokens * (2 * experts + 1) + experts + 1) * _FP32)
    # The selection, its weights, and their order by expert.
    yield KeptBytes("router", tokens * topk * (2 * _INT64 + _FP32))


def _routes_in_kernels(rank: StepRank, *, experts: int) -> bool:
    """Return whether kernels do what a router does: `routers.fused_route.fits_kernels`."""
    model = rank.model
    is_plain = model.router in ("softmax_topk", "topk_softmax") and not model.has_varying_experts
    is_plain &= model.moe_router_load_balancing_type != "seq_aux_loss"
    return rank.batch.fused_kernels and is_plain and experts <= MOST_EXPERTS


def experts_layer(rank: StepRank, *, experts: int) -> Iterator[KeptBytes]:
    """List what router, dispatch and experts keep, including the output of the norm before them."""
    model, width, tokens = rank.model, rank.width, rank.own_tokens
    hidden = tokens * model.hidden_size * width
    # Experts keep the gates, or the dispatch the selection.
    counted = _FP32 if holds_all_experts(rank) else _INT64
    yield from router(rank, experts=experts, topk=model.moe_router_topk, shared=counted)
    if holds_all_experts(rank):
        yield KeptBytes("experts", experts * _INT64)  # tokens per expert
        yield KeptBytes("experts", tokens * expert_activation_bytes(model, element_bytes=width))
        rows = float(tokens * model.moe_router_topk)
        if rank.batch.keeps_activation:
            yield KeptBytes("experts", rows * model.hidden_size * width)
    else:
        yield KeptBytes("router", hidden)
        rows = rank.received_rows
        yield from _dispatch(rank, rows=rows, experts=experts)
        ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
        yield KeptBytes("experts", rows * ((model.hidden_size + 2 * ffn) * width + _FP32))
    if rank.batch.keeps_activation:
        ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
        yield KeptBytes("experts", rows * 3 * ffn * width)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        yield _swiglu(rank, "experts", ffn=shared)


def _dispatch(rank: StepRank, *, rows: float, experts: int) -> Iterator[KeptBytes]:
    """List what megatron-core's dispatchers keep: dense routing [t, e] and row indices."""
    layout = rank.layout
    yield KeptBytes("dispatch", rank.own_tokens * rank.model.moe_router_topk * _INT64)  # experts
    if rank.model.moe_token_dispatcher_type == "allgather":
        tokens = rank.own_tokens * layout.expert * layout.expert_tensor
        local = experts // layout.expert
        yield KeptBytes("dispatch", tokens * local * (_FP32 + _BOOL) + rows * _INT64)
        return
    tokens = rank.own_tokens
    yield KeptBytes("dispatch", tokens * experts * (_FP32 + _BOOL))
    yield KeptBytes("dispatch", tokens * rank.model.moe_router_topk * _INT64)


def dense_layer(rank: StepRank) -> Iterator[KeptBytes]:
    """List what a dense SwiGLU layer keeps, with the norm before it."""
    model = rank.model
    yield from norm(rank)
    yield KeptBytes("feed_forward", rank.own_tokens * model.hidden_size * rank.width)
    yield _swiglu(rank, "feed_forward", ffn=model.ffn_hidden_size or 0)


def _swiglu(rank: StepRank, part: str, *, ffn: int) -> KeptBytes:
    """Count both projections and their product; torch keeps the gate's SiLU and a copy of up."""
    halves = 3 if rank.batch.fused_kernels else 5
    return KeptBytes(part, rank.tokens * halves * (ffn // rank.layout.tensor) * rank.width)


def embedding_and_head(rank: StepRank, chunk: Chunk) -> Iterator[KeptBytes]:
    """List what the model's first and last chunk keep besides layers."""
    tokens, model = rank.tokens, rank.model
    if chunk.has_embedding and rank.layout.tensor > 1:
        yield KeptBytes("embedding", tokens * (_INT64 + _BOOL))
    if not chunk.has_head:
        return
    yield from norm(rank)
    # Hidden states and their fp32 gradient.
    yield KeptBytes("head", tokens * model.hidden_size * (rank.width + _FP32))
    yield KeptBytes("head", head_gradient(rank))
    if rank.batch.micro_batch_size > 1:
        yield KeptBytes("head", tokens * (_INT64 + _FP32))  # labels and loss weights, transposed


def head_gradient(rank: StepRank) -> int:
    """Return the bytes of the output layer's weight gradient, computed in its forward pass."""
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    return rows * rank.model.hidden_size * _FP32


class RecomputePlan(NamedTuple):
    """Counts a chunk's layers by what is kept of them between forward and backward."""

    kept: int
    """Layers whose activations are all kept."""
    checkpointed: int
    """Inputs that are kept to recompute from."""
    recomputed: int
    """Layers recomputed at a time."""


def recompute_plan(rank: StepRank) -> RecomputePlan:
    """Return the plan of a chunk; every chunk has the same number of layers."""
    number = rank.num_layers // rank.layout.virtual_stages
    if rank.batch.recompute != "full":
        return RecomputePlan(kept=number, checkpointed=0, recomputed=0)
    count = rank.batch.recompute_num_layers
    if rank.batch.recompute_method == "uniform":
        return RecomputePlan(kept=0, checkpointed=number // count, recomputed=count)
    return RecomputePlan(kept=number - count, checkpointed=count, recomputed=1)


def micro_batch(rank: StepRank, chunk: Chunk) -> float:
    """Return the bytes that a chunk keeps of one micro-batch."""
    layers = recompute_plan(rank)
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    kept = layers.kept * layer_bytes(rank) + layers.checkpointed * hidden
    if layers.checkpointed:
        model = rank.model
        head_size = model.head_size
        kept += rotary_rows(rank) * head_size * _FP32  # angles
        if rank.batch.has_mask:
            kept += rank.tokens * rank.batch.seq_length * _BOOL
    return kept + total_bytes(embedding_and_head(rank, chunk))
