"""Calls QuACK's grouped products over rows sorted by expert, and nothing else does.

A *place* is a position in the order sorted by expert, as in `triton_kernels`. QuACK reads one
operand through an index (`lines`) while it loads it, and writes by place. `interleaved` [t * k, 2f]
has gate and up in neighbouring columns (gate 0, up 0, gate 1, ...): a thread then has both of a
pair. The weights keep their halves; QuACK interleaves them by strides. Configurations are QuACK's
own for the device: its autotuner, which takes minutes, is not run.

No number is read from the device. tests/unit/moe_ext/experts/plain_products.py has the same
functions in torch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.experts.cute_kernels import add_rows_kernel
from moe_ext.experts.slots import Mode

ALIGNMENT = 16
"""Bytes that every operand's rows and address are a multiple of: the least that TMA copies."""

_MAX_PLANS = 4096
"""QuACK keeps a plan, of about a kilobyte, for each shape it was called with; with tokens from
other ranks each call may have another number of rows."""


@dataclass(frozen=True, kw_only=True)
class RaggedRows:
    """Describes t * k rows that are sorted by expert, as QuACK wants them."""

    starts: Tensor
    """[el + 1] int32: where each expert's rows begin, and the last one's end."""
    number: int
    """t * k."""
    rows: Tensor | None
    """[t * k] int32: the row at each place; None if operands have no other order than this."""
    places: Tensor | None
    """[t * k] int32: the place of each row, the inverse of `rows`."""
    topk: int = 1
    """Rows per token (k)."""

    def lines(self, mode: Mode) -> Tensor | None:
        """Returns where an operand has the row of each place, [t * k] int32; None if there."""
        if self.rows is None or mode == "place":
            return None
        return self.rows // self.topk if mode == "token" else self.rows


def gated_product(
    source: Tensor,
    weight: Tensor,
    gates: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    is_kept: bool,
) -> tuple[Tensor | None, Tensor]:
    """Computes the first half of SwiGLU experts: silu(Wg x) * (Wu x) * gate.

    Args:
        source: [?, h].
        weight: [el, 2, f, h] gate and up projections.
        gates: [t * k] router weights by place.
        rows: of the result.
        lines: of the source.
        is_kept: whether to write what is needed for a gradient.

    Returns:
        Both projections [t * k, 2f] by place, interleaved, or None; and the result [t * k, f] by
        place.
    """
    ffn = weight.shape[2]
    projected = source.new_empty(rows.number, 2 * ffn) if is_kept else None
    product = source.new_empty(rows.number, ffn)
    if rows.number:
        from moe_ext.experts.cute_epilogue import gated_swiglu

        _forget_plans(gated_swiglu._plan_cache)
        outputs = (
            {"product": product} if projected is None else {"product": product, "D": projected}
        )
        gated_swiglu(
            source,
            weight.flatten(1, 2).mT,  # [el, h, 2f]
            out=outputs,
            store_d=is_kept,
            tuned=False,
            cu_seqlens_m=rows.starts,
            A_idx=lines,
            concat_layout=("B",),
            gates=gates.float(),
        )
    return projected, product


def gated_product_gradient(
    upstream: Tensor,
    weight: Tensor,
    gates: Tensor,
    projected: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `gated_product` from that of the experts' outputs.

    Args:
        upstream: [?, h], the gradient of each row's output.
        weight: [el, h, f] down projections.
        gates: [t * k] router weights by place.
        projected: [t * k, 2f] by place, interleaved, of `gated_product`.
        rows: of the product.
        lines: of upstream.

    Returns:
        Gradients of projected [t * k, 2f] and of gates [t * k] (fp32), and the product [t * k, f]
        again; by place.
    """
    ffn = weight.shape[2]
    grad_projected = torch.empty_like(projected)
    product = projected.new_empty(rows.number, ffn)
    if rows.number == 0:
        return grad_projected, gates.new_empty(0, dtype=torch.float32), product
    from quack.epilogue.library import dgated_mod
    from quack.gemm_interface import gemm_dgated

    epilogue = dgated_mod("swiglu", has_scale=True, has_reduce=True)
    _forget_plans(epilogue._plan_cache)
    _forget_plans(epilogue._call_cache)
    _, _, grad_gates = gemm_dgated(
        upstream,
        weight,
        projected,
        activation="swiglu",
        dx_out=grad_projected,
        postact_out=product,
        colvec_scale=gates.float(),
        colvec_reduce=True,
        cu_seqlens_m=rows.starts,
        A_idx=lines,
        dynamic_scheduler=False,
        tuned=False,
    )
    return grad_projected, grad_gates, product


def grouped_product(
    source: Tensor,
    weight: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    is_transposed: bool = False,
    is_interleaved: bool = False,
) -> Tensor:
    """Multiplies each row by its expert's matrix: x W^T, or x W if that is transposed.

    Args:
        source: [?, n].
        weight: [el, m, n], or [el, n, m] if it is transposed.
        rows: of the result.
        lines: of the source.
        is_transposed: see weight.
        is_interleaved: the source is interleaved, and the weight [el, n, m] has halves.

    Returns:
        [t * k, m] by place, of source's dtype.
    """
    matrix = weight if is_transposed else weight.mT  # [el, n, m]
    output = source.new_empty(rows.number, matrix.shape[2])
    if output.numel():
        from quack import gemm
        from quack.gemm_interface import gemm as multiply

        _forget_plans(_plans(gemm))
        multiply(
            source,
            matrix,
            out=output,
            cu_seqlens_m=rows.starts,
            A_idx=lines,
            tuned=False,
            concat_layout=("B",) if is_interleaved else None,
        )
    return output


def grouped_weight_gradient(
    left: Tensor,
    right: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    out: Tensor,
    accumulate: bool,
    is_interleaved: bool = False,
) -> None:
    """Sums left^T right over each expert's rows; zero for an expert without rows.

    Args:
        left: [?, m].
        right: [t * k, n] by place.
        rows: of both.
        lines: of left.
        out: [el, m, n] of bf16 or fp32 with one dense dimension of the last two, written in place.
        accumulate: add to what is there, in out's dtype, instead of writing over it.
        is_interleaved: right is interleaved, and out gets halves.
    """
    if rows.number == 0:
        if not accumulate:
            out.zero_()
        return
    from quack import gemm
    from quack.gemm_interface import gemm as multiply
    from quack.gemm_interface import gemm_add_inplace

    _forget_plans(_plans(gemm))
    options: dict[str, Any] = {
        "cu_seqlens_k": rows.starts,
        "A_idx": lines,
        "tuned": False,
        "concat_layout": ("out",) if is_interleaved else None,
    }
    if accumulate:
        gemm_add_inplace(left.T, right, out, **options)
    else:
        multiply(left.T, right, out=out, **options)


def add_rows(rows: Tensor, places: Tensor, topk: int) -> Tensor:
    """Sums each token's rows, in fp32 and in the order of its slots.

    Args:
        rows: [t * k, n] by place.
        places: [t * k] int32: the place of each row.
        topk: rows per token (k).

    Returns:
        [t, n] of rows' dtype.
    """
    number, width = rows.shape
    output = rows.new_empty(number // topk, width)
    # 8 elements, 16 bytes, for each thread and slot: all slots of a token are read at once.
    block_n = min(1024, 1 << (width - 1).bit_length())
    grid = output.shape[0] * -(-width // block_n)
    if grid:
        add_rows_kernel[(grid,)](
            rows, places, output, width, TOPK=topk, BLOCK_N=block_n, num_warps=4
        )
    return output


def _plans(module: Any) -> dict[Any, Any]:
    """Returns what QuACK keeps of calls of its plain products."""
    plans: dict[Any, Any] = module._gemm_plan_cache
    return plans


def _forget_plans(plans: dict[Any, Any]) -> None:
    """Bounds what QuACK keeps; what it compiled is kept elsewhere."""
    if len(plans) > _MAX_PLANS:
        plans.clear()
