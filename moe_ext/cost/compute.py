"""Estimate what one rank computes: products at rates that fall with their size, and passes.

Products are counted as `moe_ext.counting` does. A pass reads or writes a tensor once; how many
there are is counted from the code as it was when the GPU of `device` was measured. What one
micro-batch costs on its way through a chunk does not depend on the others.
"""

from dataclasses import dataclass

from moe_ext.cost.device import Device, row_elements
from moe_ext.cost.param_shards import head_widths
from moe_ext.cost.rank import Rank

_HIDDEN_PASSES = 16
"""Over the hidden states of a layer, forward and backward: two norms and residuals."""
_HEAD_PASSES, _QK_NORM_PASSES = 7, 5
"""The same over queries and keys: rotary embedding and transposition; their norm."""
_DISPATCH_PASSES = 16
"""Over the rows of dispatched experts: megatron-core permutes them by rank, sorts what arrives by
expert, and back, in both directions, and each reads and writes."""
_LOGIT_BYTES = 21
"""Moved for each logit by softmax, cross-entropy and their gradient."""
_ACCUMULATION_BYTES = 24
"""Moved for each parameter and micro-batch: its weight is read twice, its gradient is written, read
and added to the fp32 buffer, in part by way of a copy. The additions of a profiled step alone
correspond to 28, whole runs to about 20."""
_UPDATE_BYTES = 46
"""Moved for each parameter that a rank updates: norm, clipping, AdamW on fp32 state, the copy in
bf16, the zeroed gradient."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Holds what one micro-batch costs on a rank, forward and backward."""

    layers: float
    """Of the stage's layers."""
    head: float
    """Of the output layer and its loss; 0 where the stage has none."""
    accumulation: float
    """Of reading weights and adding their gradients."""

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.layers + self.head + self.accumulation


def micro_batch_seconds(rank: Rank, device: Device) -> Seconds:
    """Estimate the seconds of one micro-batch on this rank's stage."""
    backend = device.backend(rank.model.expert_backend)
    attention = _attention(rank, device, backend)
    feed_forward = _feed_forward(rank, device, backend)
    again = (rank.forward_passes("attention") - 1) / 3
    again_experts = (rank.forward_passes("experts") - 1) / 3
    if rank.model.num_experts is None:
        again_experts = again
    layer = attention * (1 + again) + feed_forward * (1 + again_experts)
    numel = sum(shard.numel for chunk in rank.chunks for shard in chunk.shards)
    has_head = rank.chunks[-1].has_head
    return Seconds(
        layers=rank.num_layers * layer,
        head=_head(rank, device) if has_head else 0.0,
        accumulation=_passes(numel * _ACCUMULATION_BYTES, device),
    )


def update_seconds(rank: Rank, device: Device) -> float:
    """Estimate the seconds of the optimizer's step, over the parameters that the rank updates."""
    layout, owned = rank.layout, 0.0
    for chunk in rank.chunks:
        for shard in chunk.shards:
            ranks = layout.expert_data if shard.is_expert else layout.data * layout.context
            owned += shard.numel / (ranks if rank.batch.use_distributed_optimizer else 1)
    return _passes(owned * _UPDATE_BYTES, device)


def _passes(num_bytes: float, device: Device) -> float:
    return num_bytes / (device.memory_gbps * 1e9)


def _product(rank: Rank, device: Device, *, width: float) -> float:
    """Return the seconds of a dense product of h and `width`, forward and backward."""
    hidden = rank.model.hidden_size
    flops = 6.0 * rank.tokens * hidden * width
    rate = device.gemm_tflops * 1e12 * device.utilization(rank.tokens, hidden, width)
    return flops / rate


def _attention(rank: Rank, device: Device, backend: str) -> float:
    """Return the seconds of self-attention, with the passes of the layer's norms and residuals."""
    model, tensor = rank.model, rank.layout.tensor
    queries, keys = (width / tensor for width in head_widths(model))
    if model.attention_experts is not None:
        found = _product(rank, device, width=2 * keys)
        found += _router(rank, device, experts=model.attention_experts)
        rows = float(rank.tokens * model.attention_topk)
        count = model.attention_experts
        # Queries and outputs are one product each, where an expert of a feed-forward has three.
        found += 2 / 3 * _experts(rank, device, backend, rows=rows, count=count, ffn=keys)
    else:
        found = _product(rank, device, width=queries + 2 * keys)
        found += _product(rank, device, width=queries)
    scores = 12.0 * model.num_attention_heads * model.head_size / tensor * rank.batch.seq_length
    found += rank.tokens * scores / (device.attention_tflops * 1e12)
    passes = _HEAD_PASSES + (_QK_NORM_PASSES if model.attention == "full_width_qk_norm" else 0)
    heads = model.num_attention_heads * model.head_size / tensor + keys
    moved = _HIDDEN_PASSES * rank.own_tokens * model.hidden_size + passes * rank.tokens * heads
    return found + _passes(moved * rank.width, device)


def _feed_forward(rank: Rank, device: Device, backend: str) -> float:
    """Return the seconds of a layer's feed-forward, without the exchange of its rows."""
    model, layout = rank.model, rank.layout
    if model.num_experts is None:
        return 3 * _product(rank, device, width=(model.ffn_hidden_size or 0) / layout.tensor)
    found = _router(rank, device, experts=model.num_experts)
    found += _experts(
        rank, device, backend,
        rows=rank.received_rows,
        count=model.num_experts // layout.expert,
        ffn=model.moe_ffn_hidden_size / layout.expert_tensor,
    )  # fmt: skip
    if layout.expert * layout.expert_tensor > 1:
        moved = rank.received_rows * model.hidden_size * rank.width
        found += _passes(_DISPATCH_PASSES * moved, device)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        found += 3 * _product(rank, device, width=shared / layout.tensor)
    return found


def _router(rank: Rank, device: Device, *, experts: int) -> float:
    return 6.0 * rank.own_tokens * rank.model.hidden_size * experts / (device.gemm_tflops * 1e12)


def _experts(
    rank: Rank, device: Device, backend: str, *, rows: float, count: int, ffn: float
) -> float:
    """Return the seconds of the experts' products and of the passes around them.

    Args:
        rank: the rank.
        device: the GPU.
        backend: a measured one.
        rows: that the rank's experts compute.
        count: of those experts.
        ffn: width of an expert on this rank.
    """
    hidden = rank.model.hidden_size
    rate = device.expert_rate(backend) / device.utilization(*_MEASURED)
    rate *= device.utilization(rows / count, hidden, ffn)
    moved = rows * row_elements(hidden, ffn) * rank.width
    return 18.0 * rows * hidden * ffn / rate + _passes(
        moved * device.expert_passes(backend), device
    )


_MEASURED = (2048.0, 2048.0, 1024.0)
"""Rows of an expert, width and expert width of the layer that was measured."""


def _head(rank: Rank, device: Device) -> float:
    """Return the seconds of the output layer and its loss."""
    rows = rank.model.padded_vocab_size / rank.layout.tensor
    passes = _passes(rank.tokens * rows * _LOGIT_BYTES, device)
    return _product(rank, device, width=rows) + passes
