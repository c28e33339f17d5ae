"""Defines kernels: grouped products over rows sorted by expert, and what is fused with them.

moe_ext/experts/triton_device.py has the words and the parts. Sums are fp32, in an order that the
shapes alone decide; there are no atomics.
"""

from __future__ import annotations

from moe_ext.experts.triton_device import add_dot, halves, lines_at, locate, multiply, traverse
from moe_ext.kernels.triton_jit import jit, tl


@jit
def product_kernel(
    source_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    output_ptr: tl.tensor,
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    TOPK: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> None:
    """Writes each row of source, by its expert's weight^T, to output.

    The weight is [num_experts, outputs, inputs], or the transpose of that.
    """
    num_columns = tl.cdiv(outputs, BLOCK_N)
    expert, first, end, column = locate(
        counts_ptr, num_rows, num_experts, num_columns, BLOCK_E, BLOCK_M, GROUP_M
    )
    if expert >= num_experts:
        return
    places = first + tl.arange(0, BLOCK_M)
    # Rows past the expert's last are read, from wherever there is something, and not written.
    readable = tl.minimum(places, num_rows - 1)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = multiply(
        source_ptr,
        lines_at(readable, index_ptr, TOPK, READ),
        weight_ptr + expert.to(tl.int64) * outputs * inputs,
        columns,
        outputs,
        inputs,
        IS_TRANSPOSED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        IS_EVEN,
    )
    lines = lines_at(readable, index_ptr, TOPK, WRITE)
    is_real = (places < end)[:, None] & (columns < outputs)[None, :]
    output_ptrs = output_ptr + lines[:, None] * outputs + columns[None, :]
    tl.store(output_ptrs, total.to(output_ptr.dtype.element_ty), mask=is_real)


@jit
def gated_kernel(
    source_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    product_ptr: tl.tensor,
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    ffn: tl.tensor,
    inputs: tl.tensor,
    TOPK: tl.constexpr,
    READ: tl.constexpr,
    READ_GATES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> None:
    """Writes silu(gate) * up * router's gate to product, and [gate, up] to projected if given.

    Gate and up are the source's rows by the two matrices of the place's expert.
    """
    num_columns = tl.cdiv(ffn, BLOCK_N)
    expert, first, end, column = locate(
        counts_ptr, num_rows, num_experts, num_columns, BLOCK_E, BLOCK_M, GROUP_M
    )
    if expert >= num_experts:
        return
    places = first + tl.arange(0, BLOCK_M)
    readable = tl.minimum(places, num_rows - 1)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    lines = lines_at(readable, index_ptr, TOPK, READ)
    left_ptrs = source_ptr + lines[:, None] * inputs + depth[None, :]
    # Gate's row n of the expert is its row n of [2 ffn, inputs], and up's is row ffn + n.
    gate_rows = expert.to(tl.int64) * 2 * ffn + columns
    gate_ptrs = weight_ptr + gate_rows[None, :] * inputs + depth[:, None]
    up_ptrs = weight_ptr + (gate_rows + ffn)[None, :] * inputs + depth[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if IS_EVEN:
            left = tl.load(left_ptrs)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(up_ptrs)
        else:
            is_inside = depth < inputs - start
            is_real = is_inside[:, None] & (columns < ffn)[None, :]
            left = tl.load(left_ptrs, mask=is_inside[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=is_real, other=0.0)
            up_weight = tl.load(up_ptrs, mask=is_real, other=0.0)
        gate = add_dot(left, gate_weight, gate)
        up = add_dot(left, up_weight, up)
        left_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    scale = tl.load(gates_ptr + lines_at(readable, index_ptr, TOPK, READ_GATES)).to(tl.float32)
    is_real = (places < end)[:, None] & (columns < ffn)[None, :]
    dtype = product_ptr.dtype.element_ty
    lines = places.to(tl.int64)[:, None]
    if projected_ptr is not None:
        projected_ptrs = projected_ptr + lines * (2 * ffn) + columns[None, :]
        tl.store(projected_ptrs, gate.to(dtype), mask=is_real)
        tl.store(projected_ptrs + ffn, up.to(dtype), mask=is_real)
    product = gate * tl.sigmoid(gate) * up * scale[:, None]
    tl.store(product_ptr + lines * ffn + columns[None, :], product.to(dtype), mask=is_real)


@jit
def gated_gradient_kernel(
    upstream_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    grad_projected_ptr: tl.tensor,
    product_ptr: tl.tensor,
    grad_gates_ptr: tl.tensor,
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    ffn: tl.tensor,
    width: tl.tensor,
    TOPK: tl.constexpr,
    READ: tl.constexpr,
    READ_GATES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> None:
    """Computes the gradient of `gated_kernel`, and its product again.

    The gradient of the product, upstream weight, never leaves the registers. grad_gates is one sum
    for each row and column of tiles, for the caller to add up.
    """
    num_columns = tl.cdiv(ffn, BLOCK_N)
    expert, first, end, column = locate(
        counts_ptr, num_rows, num_experts, num_columns, BLOCK_E, BLOCK_M, GROUP_M
    )
    if expert >= num_experts:
        return
    places = first + tl.arange(0, BLOCK_M)
    readable = tl.minimum(places, num_rows - 1)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = multiply(
        upstream_ptr,
        lines_at(readable, index_ptr, TOPK, READ),
        weight_ptr + expert.to(tl.int64) * ffn * width,
        columns,
        ffn,
        width,
        True,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        IS_EVEN,
    )
    gate_lines = lines_at(readable, index_ptr, TOPK, READ_GATES)
    scale = tl.load(gates_ptr + gate_lines).to(tl.float32)
    sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # In quarters, or all that is computed from the tile would not fit into the registers.
    half1, half2 = halves(grad, BLOCK_M, BLOCK_N)
    quarter1, quarter2 = halves(half1, BLOCK_M, BLOCK_N // 2)
    quarter3, quarter4 = halves(half2, BLOCK_M, BLOCK_N // 2)
    quarters = (quarter1, quarter2, quarter3, quarter4)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N // 4)
    for number in tl.static_range(4):
        sums += _gated_gradient(
            quarters[number],
            scale,
            projected_ptr,
            grad_projected_ptr,
            product_ptr,
            places,
            end,
            columns + number * (BLOCK_N // 4),
            ffn,
        )
    tl.store(grad_gates_ptr + gate_lines * num_columns + column, sums, mask=places < end)


@jit
def _gated_gradient(
    grad: tl.tensor,
    scale: tl.tensor,
    projected_ptr: tl.tensor,
    grad_projected_ptr: tl.tensor,
    product_ptr: tl.tensor,
    places: tl.tensor,
    end: tl.tensor,
    columns: tl.tensor,
    ffn: tl.tensor,
) -> tl.tensor:
    """Writes `gated_gradient_kernel`'s output for these columns; returns sums of grad product."""
    is_real = (places < end)[:, None] & (columns < ffn)[None, :]
    dtype = grad_projected_ptr.dtype.element_ty
    lines = places.to(tl.int64)[:, None]
    offsets = lines * (2 * ffn) + columns[None, :]
    gate = tl.load(projected_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
    up = tl.load(projected_ptr + offsets + ffn, mask=is_real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    # Columns that are not there have weights of zero, hence a gradient of zero.
    sums = tl.sum(grad * product, axis=1)
    if product_ptr is not None:
        product_ptrs = product_ptr + lines * ffn + columns[None, :]
        tl.store(product_ptrs, (product * scale[:, None]).to(dtype), mask=is_real)
    grad = grad * scale[:, None]
    tl.store(grad_projected_ptr + offsets + ffn, (grad * silu).to(dtype), mask=is_real)
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_projected_ptr + offsets, grad_gate.to(dtype), mask=is_real)
    return sums


@jit
def weight_gradient_kernel(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    output_ptr: tl.tensor,
    index_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    TOPK: tl.constexpr,
    READ_LEFT: tl.constexpr,
    READ_RIGHT: tl.constexpr,
    IS_ADDED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Writes or adds left^T right over an expert's rows to its [outputs, inputs] of output."""
    num_blocks = tl.cdiv(outputs, BLOCK_M)
    num_columns = tl.cdiv(inputs, BLOCK_N)
    expert = tl.program_id(0) // (num_blocks * num_columns)
    tile = tl.program_id(0) % (num_blocks * num_columns)
    block, column = traverse(tile, num_blocks, num_columns, GROUP_M)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts <= expert, other=0).to(tl.int32)
    end = tl.sum(counts, 0)
    first = end - tl.sum(tl.where(experts == expert, counts, 0), 0)
    end = tl.minimum(end, num_rows)
    if IS_ADDED:
        if first >= end:
            return
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.arange(0, BLOCK_K)
    readable = tl.minimum(first + steps, num_rows - 1)
    left_lines = lines_at(readable, index_ptr, TOPK, READ_LEFT)
    right_lines = lines_at(readable, index_ptr, TOPK, READ_RIGHT)
    for start in range(first, end, BLOCK_K):
        # The next expert's rows must not come in, even times zero: they may be infinite.
        is_row = (start + steps < end)[:, None]
        left_ptrs = left_ptr + left_lines[:, None] * outputs + lines[None, :]
        right_ptrs = right_ptr + right_lines[:, None] * inputs + columns[None, :]
        left = tl.load(left_ptrs, mask=is_row & (lines < outputs)[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=is_row & (columns < inputs)[None, :], other=0.0)
        # One step ahead: a load that waits for its index in the same step is not pipelined.
        readable = tl.minimum(start + BLOCK_K + steps, num_rows - 1)
        left_lines = lines_at(readable, index_ptr, TOPK, READ_LEFT)
        right_lines = lines_at(readable, index_ptr, TOPK, READ_RIGHT)
        total = add_dot(tl.trans(left), right, total)
    is_real = (lines < outputs)[:, None] & (columns < inputs)[None, :]
    offsets = (expert.to(tl.int64) * outputs + lines)[:, None] * inputs + columns[None, :]
    if IS_ADDED:
        total += tl.load(output_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=is_real)


@jit
def add_slots_kernel(
    rows_ptr: tl.tensor,
    output_ptr: tl.tensor,
    width: tl.tensor,
    TOPK: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Writes the sum of each token's TOPK rows to output, the first slot first."""
    num_columns = tl.cdiv(width, BLOCK_N)
    token = (tl.program_id(0) // num_columns).to(tl.int64)
    columns = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    is_real = columns < width
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(TOPK):
        rows_ptrs = rows_ptr + (token * TOPK + slot) * width + columns
        total += tl.load(rows_ptrs, mask=is_real, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * width + columns, total.to(output_ptr.dtype.element_ty), is_real)
