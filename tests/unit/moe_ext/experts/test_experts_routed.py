"""Experts fed by an order of rows: against a dense sum over experts, and gradients in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext.experts import EXPERT_BACKENDS, ExpertFunction, grouped_gemm
from moe_ext.experts.adapters import experts_of
from moe_ext.experts.grouped_gemm import (
    grouped_gemm_experts,
    grouped_gemm_routed_experts,
    grouped_gemm_routed_projection,
)
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.slots import ExpertOrder, Mode, sort_by_expert
from moe_ext.kernels import fused
from moe_ext.kernels.fused import FusedKernels
from moe_ext.layers import products
from moe_ext.layers.products import accumulating_linear

WIDTH, FFN, EXPERTS = 6, 4, 5
CHOICES = {
    "several": [[0, 3], [3, 1], [4, 0], [1, 3], [3, 0]],  # nobody chooses 2
    "one slot": [[1], [1], [4]],
    "one token": [[2, 0, 4]],
    "all on one": [[3], [3], [3], [3]],
    "no token": [],
}
BACKENDS = ["grouped", "loop"]


def order_of(name: str) -> tuple[Tensor, ExpertOrder]:
    chosen = torch.tensor(CHOICES[name], dtype=torch.int64)
    chosen = chosen if len(chosen) else chosen.view(0, 2)
    return chosen, sort_by_expert(chosen, num_experts=EXPERTS)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def dense(chosen: Tensor, tokens: Tensor, w1: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
    """Every expert computes every token; a matrix of weights says what counts."""
    weights = torch.zeros(len(tokens), EXPERTS, dtype=gates.dtype).scatter(1, chosen, gates)
    output = torch.zeros_like(tokens)
    for expert in range(EXPERTS):
        gate, up = w1[expert]
        made = (F.silu(tokens @ gate.T) * (tokens @ up.T)) @ w2[expert].T
        output = output + weights[:, expert, None] * made
    return output


def all_of(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHOICES)
def test_routed_experts_equal_a_dense_sum_with_all_gradients(name: str, backend: str) -> None:
    chosen, order = order_of(name)
    inputs = leaves(
        (len(chosen), WIDTH), (EXPERTS, 2, FFN, WIDTH), (EXPERTS, WIDTH, FFN), tuple(chosen.shape)
    )
    tokens, w1, w2, gates = inputs
    actual = all_of(EXPERT_BACKENDS[backend].routed_experts(tokens, w1, w2, order, gates), inputs)
    for a, b in zip(actual, all_of(dense(chosen, tokens, w1, w2, gates), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHOICES)
def test_routed_projections_equal_matrices_picked_row_by_row(name: str, backend: str) -> None:
    chosen, order = order_of(name)
    inputs = leaves((len(chosen), WIDTH), (EXPERTS, FFN, WIDTH))
    tokens, weight = inputs
    rows = torch.einsum("tn,tkmn->tkm", tokens, weight[chosen]).flatten(0, 1)
    actual = all_of(EXPERT_BACKENDS[backend].project_slots(tokens, weight, order), inputs)
    for a, b in zip(actual, all_of(rows, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    inputs = leaves((chosen.numel(), WIDTH), (EXPERTS, FFN, WIDTH))
    rows, weight = inputs
    by_slot = rows.view(*chosen.shape, WIDTH)
    sums = torch.einsum("tkn,tkmn->tm", by_slot, weight[chosen])
    actual = all_of(EXPERT_BACKENDS[backend].project_and_combine(rows, weight, order), inputs)
    for a, b in zip(actual, all_of(sums, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHOICES)
def test_the_grouped_gemms_projections_equal_matrices_picked_row_by_row(name: str) -> None:
    chosen, order = order_of(name)
    operands = {"token": len(chosen), "row": chosen.numel()}
    modes: list[tuple[Mode, Mode]] = [("token", "row"), ("row", "token")]
    for read, write in modes:
        inputs = leaves((operands[read], 16), (EXPERTS, 8, 16), dtype=torch.bfloat16)
        actual = all_of(
            grouped_gemm_routed_projection(inputs[0], inputs[1], order, read=read, write=write),
            inputs,
        )
        source, weight = exact = [each.detach().double().requires_grad_() for each in inputs]
        if read == "token":
            expected = torch.einsum("tn,tkmn->tkm", source, weight[chosen]).flatten(0, 1)
        else:
            by_slot = source.view(*chosen.shape, 16)
            expected = torch.einsum("tkn,tkmn->tm", by_slot, weight[chosen])
        for a, b in zip(actual, all_of(expected, exact), strict=True):
            if b.numel():
                # A few roundings to 8 bits on the way.
                limit = 0.03 * b.detach().abs().max().item()
                torch.testing.assert_close(a.double(), b, rtol=0, atol=limit)


def test_experts_made_of_a_projection_equal_the_loop() -> None:
    counts = torch.tensor([2, 0, 3])
    inputs = leaves((5, WIDTH), (3, 2, FFN, WIDTH), (3, WIDTH, FFN), (5,))
    hidden, w1, w2, probs = inputs
    actual = all_of(experts_of(loop_projection)(hidden, w1, w2, counts, probs), inputs)
    expected = all_of(loop_experts(hidden, w1, w2, counts, probs), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def with_buffers(parameters: list[Tensor]) -> None:
    """What megatron-core's DDP gives a parameter, the buffer holding something already."""
    for parameter in parameters:
        parameter.main_grad = torch.full(parameter.shape, 2.0)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def in_place(
    compute: Callable[[], Tensor], parameters: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    with_buffers(parameters)
    compute().backward(upstream)
    assert all(parameter.grad_added_to_main_grad for parameter in parameters)  # type: ignore[attr-defined]
    return [parameter.main_grad - 2.0 for parameter in parameters]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CHOICES)
def test_the_grouped_gemm_of_a_gpu_equals_a_dense_sum_with_all_gradients(name: str) -> None:
    chosen, order = order_of(name)
    inputs = leaves((len(chosen), 16), (EXPERTS, 2, 8, 16), (EXPERTS, 16, 8), dtype=torch.bfloat16)
    gates = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tokens, w1, w2 = inputs
    everything = [*inputs, gates]
    actual = all_of(grouped_gemm_routed_experts(tokens, w1, w2, order, gates), everything)
    exact = [each.detach().double().requires_grad_() for each in everything]
    for a, b in zip(
        actual, all_of(dense(chosen, exact[0], exact[1], exact[2], exact[3]), exact), strict=True
    ):
        if b.numel():
            # A few roundings to 8 bits on the way.
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=0.03 * b.detach().abs().max().item()
            )


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_their_buffers(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
    chosen, order = order_of("several")
    inputs = leaves(
        (len(chosen), WIDTH), (EXPERTS, 2, FFN, WIDTH), (EXPERTS, WIDTH, FFN), dtype=dtype
    )
    tokens, w1, w2 = inputs
    gates = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(3))
    upstream = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    exact = dense(chosen, tokens.double(), w1.double(), w2.double(), gates.double())
    expected = torch.autograd.grad(exact, [w1, w2], upstream.double())
    found = in_place(
        lambda: EXPERT_BACKENDS[backend].routed_experts(tokens, w1, w2, order, gates),
        [w1, w2],
        upstream.to(dtype),
    )
    # bf16 rounds each of the products' operands to 8 bits; the sums are fp32's.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=tolerance, atol=tolerance)
    assert not found[0][2].any() and not found[1][2].any()  # of the expert that nobody chose


def products_of(name: str) -> ExpertFunction:
    """Experts over sorted rows; the grouped GEMM as it is on a GPU, which CPUs have slowly."""
    return grouped_gemm_experts if name == "grouped_gemm" else EXPERT_BACKENDS[name].experts


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_the_grouped_gemm_has_its_activation_in_kernels_or_not(
    setting: FusedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    launched: list[str] = []
    for name in ("routed_unit", "routed_unit_gradient"):
        function = getattr(grouped_gemm, name)

        def noted(*inputs: Tensor, name: str = name, function: Any = function) -> Any:
            launched.append(name)
            return function(*inputs)

        monkeypatch.setattr(grouped_gemm, name, noted)
    monkeypatch.setattr(fused, "takes", lambda setting, *_: setting == "auto")
    chosen, order = order_of("several")
    shapes = [(len(chosen), 16), (EXPERTS, 2, 8, 16), (EXPERTS, 16, 8), tuple(chosen.shape)]
    inputs = leaves(*shapes, dtype=torch.bfloat16)
    inputs[3] = inputs[3].detach().float().requires_grad_()  # gates
    tokens, w1, w2, gates = inputs
    output = grouped_gemm_routed_experts(tokens, w1, w2, order, gates, fused_kernels=setting)
    actual = all_of(output, inputs)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = all_of(dense(chosen, *exact), exact)
    for a, b in zip(actual, expected, strict=True):
        # A few roundings to 8 bits, which the interpreter cuts off.
        assert (a.double() - b).norm() <= 3e-2 * b.norm()
    assert launched == (["routed_unit", "routed_unit_gradient"] if setting == "auto" else [])


@pytest.mark.parametrize("name", ["grouped", "grouped_gemm", "triton"])
def test_a_micro_batch_without_rows_loses_no_gradient_of_the_others(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
    w1, w2 = leaves((2, 2, 8, 16), (2, 16, 8), dtype=torch.bfloat16)
    (rows,) = leaves((5, 16), dtype=torch.bfloat16)
    compute = products_of(name)

    def step(*micro_batches: list[int]) -> list[Tensor]:
        """Gradients of both weights as megatron-core collects them over a step."""
        with_buffers([w1, w2])
        for counts in micro_batches:
            number = sum(counts)
            output = compute(
                rows[:number], w1, w2, torch.tensor(counts), torch.ones(number).requires_grad_()
            )
            w1.grad = w2.grad = None
            output.backward(torch.ones_like(output))
            for weight in (w1, w2):
                if weight.grad is not None and not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
                    weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
        return [weight.main_grad.clone() for weight in (w1, w2)]  # type: ignore[attr-defined]

    expected = step([3, 2])
    assert all((gradient != 2.0).any() for gradient in expected)
    for micro_batches in ([[0, 0], [3, 2]], [[3, 2], [0, 0]]):
        for a, b in zip(step(*micro_batches), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_layer_and_its_gradients_in_place_and_not(
    dtype: torch.dtype, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_has_bf16", lambda: has_bf16)
    inputs = leaves((3, 2, WIDTH), (FFN, WIDTH), dtype=dtype)
    rows, weight = inputs
    expected = all_of(rows.double() @ weight.double().T, inputs)
    actual = all_of(accumulating_linear(rows, weight), inputs)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 1, actual[0].numel()).view_as(actual[0]).to(dtype)
    (found,) = in_place(lambda: accumulating_linear(rows, weight), [weight], upstream)
    torch.testing.assert_close(
        found.double(), expected[2].double(), rtol=max(tolerance, 1e-5), atol=max(tolerance, 1e-5)
    )


def test_frozen_weights_get_no_gradient_and_their_buffers_stay() -> None:
    chosen, order = order_of("several")
    tokens, w1, w2 = leaves((len(chosen), WIDTH), (EXPERTS, 2, FFN, WIDTH), (EXPERTS, WIDTH, FFN))
    frozen = [w1.detach(), w2.detach()]
    with_buffers(frozen)
    gates = torch.rand(chosen.shape)
    output = EXPERT_BACKENDS["grouped"].routed_experts(tokens, frozen[0], frozen[1], order, gates)
    output.sum().backward()
    assert tokens.grad is not None and tokens.grad.any()
    for weight in frozen:
        assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert (weight.main_grad == 2.0).all()  # type: ignore[attr-defined]


def test_counts_that_do_not_add_up_are_refused() -> None:
    chosen, order = order_of("several")
    wrong = dataclasses.replace(order, tokens_per_expert=order.tokens_per_expert + 1)
    tokens, w1, w2 = leaves((len(chosen), WIDTH), (EXPERTS, 2, FFN, WIDTH), (EXPERTS, WIDTH, FFN))
    with pytest.raises(ValueError, match="tokens_per_expert sums to 15, but there are 10 tokens"):
        EXPERT_BACKENDS["grouped"].routed_experts(tokens, w1, w2, wrong, torch.rand(chosen.shape))


class _RowsOfProducts(TorchDispatchMode):
    """Collects the dimension of every bf16 matrix product that experts' rows have."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            left, right = args
            assert left.dtype == torch.bfloat16
            # The others are the widths.
            self.numbers |= {*left.shape, right.shape[1]} - {2 * FFN, FFN, WIDTH}
        return func(*args, **(kwargs or {}))


def test_bf16_products_on_a_cpu_have_multiples_of_32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bf16", lambda: True)
    counts = [33, 0, 1, 70, 32]
    chosen = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    order = sort_by_expert(chosen, num_experts=EXPERTS)
    inputs = leaves(
        (len(chosen), WIDTH), (EXPERTS, 2, FFN, WIDTH), (EXPERTS, WIDTH, FFN), (len(chosen), 1)
    )
    tokens, w1, w2, gates = inputs
    expected = all_of(dense(chosen, tokens, w1, w2, gates), inputs)
    rounded = [each.detach().bfloat16().requires_grad_() for each in inputs]
    seen = _RowsOfProducts()
    with seen:
        tokens, w1, w2, gates = rounded
        output = EXPERT_BACKENDS["grouped"].routed_experts(tokens, w1, w2, order, gates)
        actual = all_of(output, rounded)
    assert seen.numbers == {64, 32, 96}
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_whether_bf16_products_are_added_to_fp32_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(start: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        return torch.add(start, left.float() @ right.float(), out=options["out"])

    def add_rounded(start: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        rounded = (start + left.float() @ right.float()).bfloat16()
        return options["out"].copy_(rounded)

    def write(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        return torch.matmul(left.float(), right.float(), out=options["out"])

    asked = products.writes_fp32_on.__wrapped__
    assert not asked("cpu")  # refused by torch
    monkeypatch.setattr(torch, "mm", write)
    monkeypatch.setattr(torch, "addmm", add)
    assert asked("cpu")
    monkeypatch.setattr(torch, "addmm", add_rounded)
    assert not asked("cpu")
