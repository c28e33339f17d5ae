"""What a micro-batch keeps between its forward and its backward pass, from configs alone.

Every function lists bytes of one rank by what they are for. They are counted by storage, as memory
is: a view that is kept keeps all it is a view of. What a GPU and a CPU keep differs in the norms,
which a GPU computes in one kernel.
`tests/distributed/test_plan_measured.py` holds all of it to what autograd is given to keep.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_ext.cost.memory import expert_activation_bytes
from moe_ext.cost.param_shards import Chunk, head_widths
from moe_ext.cost.traffic import Batch, Rank

_FP32, _INT64, _BOOL = 4, 8, 1


@dataclass(frozen=True, kw_only=True)
class Step(Batch):
    """A step, with what memory depends on besides traffic."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers `recompute` "full" takes."""
    recompute_num_layers: int = 1
    """uniform: layers of a unit; block: layers of a chunk that are computed again, one by one."""
    recompute_core_attention: bool = False
    """Whether scores and what they select are computed again."""
    keeps_activation: bool = False
    """Whether the expert backend keeps more than tokens and projections (`ExpertBackend`)."""
    converts_bf16: bool = False
    """Whether products of bf16 are computed in fp32, as on a CPU without instructions for them."""
    has_positions: bool = False
    """Whether each row of a micro-batch counts its positions by itself."""
    has_mask: bool = False
    """Whether documents are kept apart by an explicit mask."""


@dataclass(frozen=True, kw_only=True)
class StepRank(Rank):
    """A rank of a run, its step known as far as memory depends on it."""

    batch: Step


class Item(NamedTuple):
    """Bytes that are kept for one purpose."""

    part: str
    """What for."""
    size: float
    """Bytes; a fraction where routing is not even."""


def total(items: Iterable[Item]) -> float:
    """All their bytes."""
    return sum(item.size for item in items)


def by_part(items: Iterable[Item]) -> dict[str, float]:
    """Their bytes by purpose."""
    found: dict[str, float] = {}
    for item in items:
        found[item.part] = found.get(item.part, 0.0) + item.size
    return found


def received_rows(rank: StepRank) -> float:
    """Rows that this rank's experts compute for a micro-batch: those of the busiest rank."""
    rows = rank.own_tokens * rank.model.moe_router_topk * rank.layout.expert_tensor
    return rows * (rank.batch.imbalance if rank.layout.expert > 1 else 1.0)


def is_local(rank: StepRank) -> bool:
    """Whether the rank holds all experts of a layer whole, so that no token leaves it."""
    return rank.layout.expert * rank.layout.expert_tensor == 1


def layer(rank: StepRank) -> Iterator[Item]:
    """One layer, nothing of it computed again but what the step says of its parts."""
    yield from attention_layer(rank)
    if rank.model.num_experts is None:
        yield from dense_layer(rank)
    elif rank.batch.recompute == "moe":
        yield from norm(rank)
        yield Item("experts", rank.own_tokens * rank.model.hidden_size * rank.width)
    else:
        yield from norm(rank)
        yield from experts_layer(rank, experts=rank.model.num_experts)


def layer_total(rank: StepRank) -> float:
    """All that one layer keeps."""
    return total(layer(rank))


def norm(rank: StepRank) -> Iterator[Item]:
    """RMSNorm of the hidden states, its result not counted.

    Kept are the input (a CPU keeps it converted to fp32), its root mean square, and the input
    divided by that.
    """
    of_input = _FP32 if rank.batch.device_type == "cpu" else rank.width
    size = rank.model.hidden_size * (of_input + rank.width) + _FP32
    yield Item("norms", rank.own_tokens * size)


def attention_layer(rank: StepRank) -> Iterator[Item]:
    """The norm before a self-attention, and the attention."""
    yield from norm(rank)
    yield Item("attention", rank.own_tokens * rank.model.hidden_size * rank.width)
    if rank.model.attention_experts is not None:
        yield from _moa(rank, experts=rank.model.attention_experts)
        return
    model, tensor = rank.model, rank.layout.tensor
    queries, keys = (width // tensor for width in head_widths(model))
    # Values are a view of the product that made all three, unless they are gathered.
    is_product_kept = rank.layout.context == 1
    if model.attention == "full_width_qk_norm":
        yield from _qk_norm(rank, widths=(queries, keys))
        is_product_kept |= _is_view(rank)
    if is_product_kept:
        yield Item("attention", rank.tokens * (queries + 2 * keys) * rank.width)
    yield from _core_attention(rank, queries=queries, keys=keys)


def _qk_norm(rank: StepRank, *, widths: tuple[int, int]) -> Iterator[Item]:
    """The norms of queries and of keys, as `norm`; over several ranks nothing is converted."""
    of_input = _FP32 if _is_converted(rank) else rank.width
    if _is_view(rank):
        of_input = 0
    for width in widths:
        yield Item("norms", rank.tokens * (width * (of_input + rank.width) + _FP32))


def _is_view(rank: StepRank) -> bool:
    """Whether these norms keep their inputs where they lie: one group's heads lie together."""
    groups = rank.model.num_query_groups or rank.model.num_attention_heads
    return groups == rank.layout.tensor and not _is_converted(rank)


def _is_converted(rank: StepRank) -> bool:
    return rank.layout.tensor == 1 and rank.batch.device_type == "cpu" and rank.batch.bf16


def _core_attention(rank: StepRank, *, queries: int, keys: int) -> Iterator[Item]:
    """Rotated queries and keys, and what attention makes of them; values are the caller's.

    Args:
        rank: the rank.
        queries: width of this rank's query heads.
        keys: width of its key heads.
    """
    model, width, tokens = rank.model, rank.width, rank.tokens
    head_size = model.kv_channels or model.hidden_size // model.num_attention_heads
    # Cosines and sines of each angle, once for queries and once for keys.
    yield Item("attention", 4 * positions(rank) * head_size * width)
    yield Item("attention", tokens * queries * width)
    if rank.layout.context == 1:
        yield Item("attention", tokens * keys * width)
    else:
        whole = rank.batch.seq_length * rank.batch.micro_batch_size
        yield Item("attention", whole * 2 * keys * width)
    found = tokens * queries * width
    if rank.batch.recompute_core_attention:
        yield Item("attention", found)
        return
    heads = model.num_attention_heads // rank.layout.tensor
    yield Item("attention", found + tokens * heads * _FP32)  # and the sums of exponentials
    if rank.layout.context > 1 or (rank.batch.device_type == "cuda" and not rank.batch.bf16):
        yield Item("attention", found)  # a copy: both chunks in one, or by position
    if rank.batch.has_mask:
        yield Item("attention", rank.batch.micro_batch_size * _table(rank) * width)
    elif rank.layout.context > 1 and rank.batch.device_type == "cpu":
        yield Item("attention", _table(rank) * width)  # a GPU's kernels need none


def _table(rank: StepRank) -> int:
    """Pairs of a query on this rank and a key that an explicit mask speaks of, a sequence.

    Under context parallelism those of an early chunk of queries and of a late one with the keys
    before their ends.
    """
    if rank.layout.context == 1:
        return rank.batch.seq_length**2
    chunks = 2 * rank.layout.context
    return (rank.batch.seq_length // chunks) ** 2 * (chunks + 1)


def positions(rank: StepRank) -> int:
    """Angles' rows: one a position where all sequences count alike."""
    rows = rank.batch.micro_batch_size if rank.batch.has_positions else 1
    return rank.batch.seq_length // rank.layout.context * rows


def _moa(rank: StepRank, *, experts: int) -> Iterator[Item]:
    """A mixture of attention heads: all experts are on the rank, with some heads of each."""
    model, width, tokens = rank.model, rank.width, rank.tokens
    topk, keys = model.attention_topk, head_widths(model)[1] // rank.layout.tensor
    yield from router(rank, experts=experts, topk=topk)
    yield _selection(rank, experts=experts)
    if rank.is_split:
        yield Item("attention", tokens * model.hidden_size * width)
    rows = tokens * topk
    yield Item("attention", rows * (3 * _INT64 + _FP32))  # the order of rows, and gates
    yield Item("attention", rows * model.hidden_size * width)  # tokens, once a slot
    if rank.layout.context == 1:
        yield Item("attention", tokens * 2 * keys * width)  # keys and values, in one
    yield from _core_attention(rank, queries=topk * keys, keys=keys)
    yield Item("attention", rows * keys * width)  # gated


def router(rank: StepRank, *, experts: int, topk: int) -> Iterator[Item]:
    """Logits, probabilities and both losses."""
    tokens, model = rank.own_tokens, rank.model
    if model.moe_router_dtype == "fp32" and rank.width < _FP32:
        yield Item("router", (tokens + experts) * model.hidden_size * _FP32)
    # Probabilities, logits, their sums; each expert's share, and the loss.
    yield Item("router", (tokens * (2 * experts + 1) + experts + 1) * _FP32)
    if model.router == "topk_softmax":
        yield Item("router", tokens * topk * (_INT64 + _FP32))
    else:
        yield Item("router", tokens * experts * _BOOL)


def _selection(rank: StepRank, *, experts: int) -> Item:
    """A token's experts and probabilities as lists, of all sorted by choice; experts' counts."""
    return Item("router", experts * (rank.own_tokens * (_INT64 + _FP32) + _INT64))


def experts_layer(rank: StepRank, *, experts: int) -> Iterator[Item]:
    """Router, dispatch, experts; the norm before them is not counted, its result is."""
    model, width, tokens = rank.model, rank.width, rank.own_tokens
    hidden = tokens * model.hidden_size * width
    yield from router(rank, experts=experts, topk=model.moe_router_topk)
    if is_local(rank):
        yield _selection(rank, experts=experts)
        yield Item("experts", tokens * expert_activation_bytes(model, element_bytes=width))
        rows = float(tokens * model.moe_router_topk)
        if rank.batch.keeps_activation:
            yield Item("experts", rows * model.hidden_size * width)
    else:
        yield Item("router", hidden)
        rows = received_rows(rank)
        yield from _dispatch(rank, rows=rows, experts=experts)
        ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
        yield Item("experts", rows * ((model.hidden_size + 2 * ffn) * width + _FP32))
    if rank.batch.keeps_activation:
        ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
        yield Item("experts", rows * 3 * ffn * width)


def _dispatch(rank: StepRank, *, rows: float, experts: int) -> Iterator[Item]:
    """megatron-core's dispatchers: probabilities and choices by expert, the order of rows."""
    layout = rank.layout
    if rank.model.moe_token_dispatcher_type == "allgather":
        tokens = rank.own_tokens * layout.expert * layout.expert_tensor
        local = experts // layout.expert
        yield Item("dispatch", tokens * local * (_FP32 + _BOOL) + rows * _INT64)
        return
    tokens = rank.own_tokens
    yield Item("dispatch", tokens * experts * (_FP32 + _BOOL))
    yield Item("dispatch", tokens * rank.model.moe_router_topk * _INT64)


def dense_layer(rank: StepRank) -> Iterator[Item]:
    """Norm, both projections, SwiGLU."""
    model = rank.model
    ffn = (model.ffn_hidden_size or 0) // rank.layout.tensor
    yield from norm(rank)
    yield Item("feed_forward", rank.own_tokens * model.hidden_size * rank.width)
    # Both projections, the gate's silu, the other half by itself, and their product.
    yield Item("feed_forward", rank.tokens * 5 * ffn * rank.width)


def ends(rank: StepRank, chunk: Chunk) -> Iterator[Item]:
    """What the model's first and last chunk keep besides layers."""
    tokens, model = rank.tokens, rank.model
    if chunk.has_embedding and rank.layout.tensor > 1:
        yield Item("embedding", tokens * (_INT64 + _BOOL))
    if not chunk.has_head:
        return
    yield from norm(rank)
    yield Item("head", tokens * model.hidden_size * (rank.width + _FP32))  # and their gradient
    yield Item("head", head_gradient(rank))
    if rank.batch.micro_batch_size > 1:
        yield Item("head", tokens * (_INT64 + _FP32))  # labels and weights, by position


def head_gradient(rank: StepRank) -> int:
    """Bytes of the output layer's gradient, which its forward pass makes."""
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    return rows * rank.model.hidden_size * _FP32


class Layers(NamedTuple):
    """What becomes of a chunk's layers between forward and backward."""

    whole: int
    """Kept whole."""
    inputs: int
    """Of which an input is kept."""
    again: int
    """Computed again at a time."""


def layers_of(rank: StepRank) -> Layers:
    """Of any chunk; all have as many layers."""
    number = rank.num_layers // rank.layout.virtual_stages
    if rank.batch.recompute != "full":
        return Layers(whole=number, inputs=0, again=0)
    count = rank.batch.recompute_num_layers
    if rank.batch.recompute_method == "uniform":
        return Layers(whole=0, inputs=number // count, again=count)
    return Layers(whole=number - count, inputs=count, again=1)


def micro_batch(rank: StepRank, chunk: Chunk) -> float:
    """Bytes that a chunk keeps of one micro-batch."""
    layers = layers_of(rank)
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    kept = layers.whole * layer_total(rank) + layers.inputs * hidden
    if layers.inputs:
        model = rank.model
        head_size = model.kv_channels or model.hidden_size // model.num_attention_heads
        kept += positions(rank) * head_size * _FP32  # angles
        if rank.batch.has_mask:
            kept += rank.tokens * rank.batch.seq_length * _BOOL
    return kept + total(ends(rank, chunk))
