"""Writes weight gradients straight into the buffers megatron-core reduces them in.

megatron-core's DDP gives every parameter a `main_grad`, a view of one fp32 buffer, and adds each
gradient to it when autograd has made it. Where a backward pass can add its product to the buffer
itself, the gradient is never a tensor of its own: one write, one read and one allocation of the
weight's size less. megatron-core has the same protocol for its own linear layers, under
`gradient_accumulation_fusion`.

The mark on a weight lasts until its buffer is set to zero, for all micro-batches of a step: every
backward pass of a weight must go one way, through the buffer or by autograd. A gradient that
autograd brings for a marked weight is dropped: a hook on it, or a penalty on the weight itself, has
no effect.
"""

import torch
from torch import Tensor


def accumulation_buffer(weight: Tensor) -> Tensor | None:
    """Returns the buffer that gradients of `weight` are added to, or None.

    Args:
        weight: a parameter, wrapped by megatron-core's DDP or not.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def mark_added(weight: Tensor) -> Tensor:
    """Tells DDP that the gradient is in the buffer already.

    Args:
        weight: whose `accumulation_buffer` was added to in this backward pass.

    Returns:
        What the backward pass has to return in the gradient's place, or DDP would not count the
        weight as ready: a tensor of the weight's shape that nobody reads or writes.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
