"""Computes matrix products into existing memory."""

import functools
import math

import torch
from torch import Tensor

from moe_ext.layers.gradients import accumulation_buffer, mark_added

_ROW_MULTIPLE = 32


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that products of `tensor` are computed in on its device.

    A CPU without instructions for bf16 multiplies it several hundred times slower than fp32, and
    less exactly; there the operands are converted, a block at a time.
    """
    if tensor.dtype == torch.bfloat16 and not tensor.is_cuda and not _has_bf16():
        return torch.float32
    return tensor.dtype


@functools.cache
def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def working_rows(number: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many rows a product has where experts get any number of them.

    oneDNN compiles a kernel in bf16 for every number of rows, keeps up to 1,024 of them at about
    0.7 MB, and takes longer to compile one than to multiply; on a CPU rows are filled up with zeros
    to a multiple of 32.

    Args:
        number: of an expert.
        dtype: that products are computed in.
        device: where.
    """
    if dtype != torch.bfloat16 or device.type == "cuda":
        return number
    return math.ceil(number / _ROW_MULTIPLE) * _ROW_MULTIPLE


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Computes out = left right.

    Args:
        left: [n, d] of a working dtype.
        right: [d, m] of the same.
        out: [n, m] of any dtype, or its first rows.
    """
    if len(out) < len(left):
        out.copy_(torch.mm(left, right)[: len(out)])
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif _writes_fp32(left, out):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(left, right))


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Computes out += left right.

    Args:
        left: [n, d] of a working dtype.
        right: [d, m] of the same.
        out: [n, m] of any dtype.
    """
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out)
    elif _writes_fp32(left, out):
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.add_(torch.mm(left, right))


def _writes_fp32(operand: Tensor, out: Tensor) -> bool:
    """Says whether a product of bf16 can be written or added to fp32 without a tensor between.

    On a GPU cuBLAS sums in fp32 and can end with what is in memory: one read and one write of the
    result, where a bf16 product of its own costs two more of each and is rounded.
    """
    is_wider = operand.dtype == torch.bfloat16 and out.dtype == torch.float32
    return is_wider and operand.is_cuda and writes_fp32_on("cuda")


@functools.cache
def writes_fp32_on(device: str) -> bool:
    """Says whether torch writes and adds bf16 products to fp32 there; a small problem is tried.

    Some releases refuse to add to fp32, and CPUs and ROCm have neither.
    """
    left, right = (torch.arange(9.0, device=device).view(3, 3).bfloat16() for _ in range(2))
    # Whole numbers, exact in any order of summation; 2^-10 would be lost in bf16.
    start = torch.full((3, 3), 2.0**-10, device=device)
    exact = left.float() @ right.float()
    try:
        added = start.clone()
        torch.addmm(added, left, right, out_dtype=torch.float32, out=added)
        written = torch.mm(left, right, out_dtype=torch.float32, out=torch.empty_like(start))
    except (RuntimeError, TypeError):
        return False
    return torch.equal(added, exact + start) and torch.equal(written, exact)


def accumulating_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Computes rows weight^T; the weight's gradient goes straight into its buffer if there is one.

    Differentiable once.

    Args:
        rows: [..., n].
        weight: [m, n] of rows' dtype.

    Returns:
        [..., m] of rows' dtype.
    """
    output: Tensor = _Linear.apply(rows, weight)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        work = working_dtype(rows)
        return (rows.to(work) @ weight.to(work).T).to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_rows, needs_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
        work = working_dtype(rows)
        grad = grad.to(work)
        grad_rows = (grad @ weight.to(work)).to(rows.dtype) if needs_rows else None
        if not needs_weight:
            return grad_rows, None
        left = grad.reshape(-1, grad.shape[-1]).T  # [m, t]
        right = rows.reshape(-1, rows.shape[-1]).to(work)  # [t, n]
        buffer = accumulation_buffer(weight)
        if buffer is None:
            return grad_rows, (left @ right).to(weight.dtype)
        add_product(left, right, buffer)
        return grad_rows, mark_added(weight)
