"""The functions of moe_ext/experts/cute_products.py in plain torch, expert by expert.

In any floating dtype, with the same arguments, arrangements and results: what is interleaved there
is interleaved here.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.cute_products import RaggedRows

NAMES = (
    *("gated_product", "gated_product_gradient", "grouped_product", "grouped_weight_gradient"),
    "add_rows",
)


def parts(rows: RaggedRows) -> list[slice]:
    """Where the rows of each expert are."""
    starts = rows.starts.tolist()
    return [slice(first, end) for first, end in itertools.pairwise(starts)]


def read(source: Tensor, lines: Tensor | None) -> Tensor:
    return source if lines is None else source[lines.long()]


def interleave(halves: Tensor, dim: int) -> Tensor:
    """[first, second] to [first 0, second 0, first 1, ...] along a dimension."""
    return torch.stack(halves.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def gated_product(
    source: Tensor,
    weight: Tensor,
    gates: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    is_kept: bool,
) -> tuple[Tensor | None, Tensor]:
    exact = grouped_product(source, interleave(weight.flatten(1, 2), 1), rows, lines)
    gate, up = exact[:, 0::2], exact[:, 1::2]
    return (exact if is_kept else None), (F.silu(gate) * up * gates[:, None]).to(source.dtype)


def gated_product_gradient(
    upstream: Tensor,
    weight: Tensor,
    gates: Tensor,
    projected: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grouped_product(upstream, weight, rows, lines, is_transposed=True)  # [t * k, f]
    with torch.enable_grad():
        pairs, factors = projected.detach().requires_grad_(), gates.detach().requires_grad_()
        product = (F.silu(pairs[:, 0::2]) * pairs[:, 1::2] * factors[:, None]).to(projected.dtype)
        by_pairs, by_gates = torch.autograd.grad(product, [pairs, factors], grad)
    return by_pairs, by_gates, product.detach()


def grouped_product(
    source: Tensor,
    weight: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    is_transposed: bool = False,
    is_interleaved: bool = False,
) -> Tensor:
    matrix = weight if is_transposed else weight.mT  # [el, n, m]
    matrix = interleave(matrix, 1) if is_interleaved else matrix
    placed = read(source, lines)
    assert len(placed) == rows.number
    output = torch.full((rows.number, matrix.shape[2]), torch.nan, dtype=source.dtype)
    for expert, part in enumerate(parts(rows)):
        output[part] = placed[part] @ matrix[expert]
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
    placed = read(left, lines)
    assert len(placed) == len(right) == rows.number
    for expert, part in enumerate(parts(rows)):
        found = placed[part].to(right.dtype).T @ right[part]
        if is_interleaved:
            found = torch.cat([found[:, 0::2], found[:, 1::2]], dim=1)
        out[expert] = out[expert] + found if accumulate else found


def add_rows(rows: Tensor, places: Tensor, topk: int) -> Tensor:
    return rows[places.long()].unflatten(0, (-1, topk)).sum(dim=1)
