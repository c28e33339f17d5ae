"""The triton backend against plain sums in float64: on the GPU, or in triton's interpreter.

tests/conftest.py asks for the interpreter where there is no GPU; programs take milliseconds in it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.experts import triton_products, triton_tiles
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.slots import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    sort_rows,
    unpermute_tokens,
    unsort_rows,
)
from moe_ext.experts.triton_experts import (
    is_available,
    triton_experts,
    triton_project_and_combine,
    triton_project_slots,
    triton_projection,
    triton_routed_experts,
)
from moe_ext.experts.triton_products import SortedRows, grouped_weight_gradient
from moe_ext.experts.triton_tiles import Tile
from moe_ext.kernels import triton_jit

pytest.importorskip("triton", reason="triton has no wheel for this platform")

DEVICE = "cpu" if triton_jit.IS_INTERPRETED else "cuda"

# The least that tl.dot takes, so that a few dozen rows make several blocks, columns, groups, steps.
SMALLEST = Tile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2, group_m=2)

# fp32: sums of at most 80 terms of order one, 2^-24 each, in another order.
# bf16: at most four roundings on the way to any result, each below 2^-7: the interpreter cuts off.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4 * 2.0**-7}


def routed(inputs: Sequence[Tensor], order: ExpertOrder) -> Tensor:
    """Of tokens, weight1, weight2, gates."""
    tokens, weight1, weight2, gates = inputs
    return triton_routed_experts(tokens, weight1, weight2, order, gates)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens t, slots k, experts e, widths h and f; the experts that get any, or None for all."""

    t: int
    k: int
    e: int
    h: int
    f: int
    used: tuple[int, ...] | None = None

    def order(self, generator: torch.Generator) -> ExpertOrder:
        used = torch.tensor(self.used or range(self.e))
        draws = torch.rand(self.t, len(used), generator=generator).argsort(dim=1)[:, : self.k]
        return sort_by_expert(used[draws].to(DEVICE), num_experts=self.e)


CASES = {
    "odd sizes": Case(t=11, k=3, e=3, h=19, f=21),
    "whole blocks": Case(t=10, k=2, e=2, h=32, f=32),
    "empty experts": Case(t=9, k=2, e=6, h=17, f=16, used=(1, 2, 4)),
    "all on one expert": Case(t=37, k=1, e=3, h=16, f=18, used=(1,)),
    "one token": Case(t=1, k=2, e=3, h=20, f=5),
    "more experts than rows": Case(t=2, k=1, e=37, h=1, f=1),
}
# Every case in fp32, whose limit is sharp; bf16 differs from it in roundings alone.
EACH = [(name, torch.float32) for name in CASES] + [
    (name, torch.bfloat16) for name in ("odd sizes", "one token")
]


@pytest.fixture
def _smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("product_tile", "gated_tile", "gated_gradient_tile", "weight_gradient_tile"):
        monkeypatch.setattr(triton_tiles, name, lambda *_, **__: SMALLEST)


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Values with products of order one over the last dimension, wanting a gradient."""
    scale = shape[-1] ** -0.5 if len(shape) > 2 else 1.0
    values = torch.randn(shape, generator=generator) * scale
    return values.to(DEVICE, dtype).requires_grad_()


def results(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    """Output and all gradients."""
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def compare(
    actual: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: list[Tensor],
    upstream: Tensor,
) -> None:
    """Output and all gradients by norm, those of each expert's weights by themselves."""
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    expected = results(exact, doubles, upstream)
    limit = LIMITS[inputs[0].dtype]
    for a, b in zip(results(actual, inputs, upstream), expected, strict=True):
        assert a.shape == b.shape
        parts = zip(a.double(), b, strict=True) if a.dim() > 2 else [(a.double(), b)]
        for part, exact_part in parts:
            assert (part - exact_part).norm() <= limit * exact_part.norm()


def exact_experts(order: ExpertOrder) -> Callable[..., Tensor]:
    def compute(tokens: Tensor, weight1: Tensor, weight2: Tensor, gates: Tensor) -> Tensor:
        rows = permute_tokens(tokens, order)
        probs = sort_rows(gates.flatten(), order)
        return unpermute_tokens(
            loop_experts(rows, weight1, weight2, order.tokens_per_expert, probs), order
        )

    return compute


def routed_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """tokens, weight1, weight2 and fp32 gates."""
    shapes = [(case.t, case.h), (case.e, 2, case.f, case.h), (case.e, case.h, case.f)]
    inputs = [random(generator, *shape, dtype=dtype) for shape in shapes]
    return [*inputs, random(generator, case.t, case.k, dtype=torch.float32)]


def compare_routed(case: Case, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    order = case.order(generator)
    inputs = routed_inputs(case, generator, dtype)
    upstream = random(generator, case.t, case.h, dtype=dtype).detach()
    compare(
        lambda x, w1, w2, gates: triton_routed_experts(x, w1, w2, order, gates),
        exact_experts(order),
        inputs,
        upstream,
    )


@pytest.mark.usefixtures("_smallest_tiles")
@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_routed_equals_the_loop_in_float64_with_all_gradients(
    name: str, dtype: torch.dtype
) -> None:
    compare_routed(CASES[name], dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows_per_expert", [2, 20, 40, 70])
def test_tiles_of_the_table_give_the_same(rows_per_expert: int, dtype: torch.dtype) -> None:
    case = Case(t=rows_per_expert, k=1, e=1, h=70, f=130)
    compare_routed(case, dtype)


@pytest.mark.usefixtures("_smallest_tiles")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_sorted_rows_equal_the_loop_in_float64_with_all_gradients(dtype: torch.dtype) -> None:
    counts = [3, 0, 18, 1]
    generator = torch.Generator().manual_seed(1)
    t, e, h, f = sum(counts), len(counts), 18, 7
    sizes = torch.tensor(counts)
    inputs = [random(generator, *s, dtype=dtype) for s in [(t, h), (e, 2, f, h), (e, h, f)]]
    inputs.append(random(generator, t, dtype=torch.float32))
    compare(
        lambda x, w1, w2, p: triton_experts(x, w1, w2, sizes, p),
        lambda x, w1, w2, p: loop_experts(x, w1, w2, sizes, p),
        inputs,
        random(generator, t, h, dtype=dtype).detach(),
    )


@pytest.mark.usefixtures("_smallest_tiles")
@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_products_equal_the_loop_in_float64_with_all_gradients(
    name: str, dtype: torch.dtype
) -> None:
    """Sorted rows, tokens to slots, and slots to tokens."""
    case, generator = CASES[name], torch.Generator().manual_seed(2)
    order = case.order(generator)
    counts = order.tokens_per_expert
    number, n, m = case.t * case.k, case.h, case.f
    weight = random(generator, case.e, m, n, dtype=dtype)
    tokens = random(generator, case.t, n, dtype=dtype)
    rows = random(generator, number, n, dtype=dtype)
    upstream = random(generator, number, m, dtype=dtype).detach()

    def loop(rows: Tensor, weight: Tensor) -> Tensor:
        return loop_projection(rows, weight, counts)

    compare(lambda x, w: triton_projection(x, w, counts), loop, [rows, weight], upstream)
    compare(
        lambda x, w: triton_project_slots(x, w, order),
        lambda x, w: unsort_rows(loop(permute_tokens(x, order), w), order),
        [tokens, weight],
        upstream,
    )
    compare(
        lambda x, w: triton_project_and_combine(x, w, order),
        lambda x, w: unpermute_tokens(loop(sort_rows(x, order), w), order),
        [rows, weight],
        upstream[: case.t],
    )


def small() -> tuple[Case, ExpertOrder, list[Tensor]]:
    case, generator = Case(t=5, k=2, e=3, h=8, f=4), torch.Generator().manual_seed(3)
    return case, case.order(generator), routed_inputs(case, generator, torch.float32)


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradients_asked_for_are_computed(
    wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, order, inputs = small()
    output = routed(inputs, order)
    expected = torch.autograd.grad(output.sum(), inputs)[wanted]
    for number, each in enumerate(inputs):
        each.requires_grad_(number == wanted)
    made = []
    for name in ("grouped_product", "grouped_weight_gradient", "gated_product_gradient"):
        function = getattr(triton_products, name)

        def noted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            made.append((name, kwargs.get("is_product_needed")))
            return function(*args, **kwargs)

        monkeypatch.setattr(f"moe_ext.experts.triton_autograd.{name}", noted)
    output = routed(inputs, order)
    made.clear()
    output.sum().backward()
    assert [each.grad is not None for each in inputs] == [i == wanted for i in range(4)]
    assert torch.equal(inputs[wanted].grad, expected)  # type: ignore[arg-type]
    rest = {0: ["grouped_product"], 1: ["grouped_weight_gradient"], 2: ["grouped_weight_gradient"]}
    assert [name for name, _ in made] == ["gated_product_gradient", *rest.get(wanted, [])]
    assert made[0][1] == (wanted == 2)


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept() -> None:
    _, order, inputs = small()
    expected = routed(inputs, order)
    with torch.no_grad():
        assert torch.equal(routed(inputs, order), expected)
    rows = SortedRows(
        counts=order.tokens_per_expert, number=len(order.rows), index=order.rows, topk=order.topk
    )
    tokens, weight1, _, gates = (each.detach() for each in inputs)
    projected, _ = triton_products.gated_product(tokens, weight1, gates, rows, is_kept=False)
    assert projected is None


def test_operands_need_not_be_contiguous() -> None:
    case, order, inputs = small()
    expected = results(lambda *x: routed(x, order), inputs, torch.ones(case.t, case.h))
    strided = [each.detach().transpose(0, 1).contiguous().transpose(0, 1) for each in inputs]
    assert not any(each.is_contiguous() for each in strided)
    strided = [each.requires_grad_() for each in strided]
    output = routed(strided, order)
    # The gradient of a sum is one number, with strides of zero.
    actual = [output, *torch.autograd.grad(output.sum(), strided)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_no_tokens_launch_nothing_and_give_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case, generator = Case(t=0, k=2, e=3, h=8, f=4), torch.Generator().manual_seed(4)
    order = case.order(generator)
    inputs = routed_inputs(case, generator, torch.float32)
    monkeypatch.setattr(triton_products, "triton_kernels", None)
    output = routed(inputs, order)
    assert output.shape == (0, case.h)
    output.sum().backward()
    for each in inputs:
        assert each.grad is not None and torch.equal(each.grad, torch.zeros_like(each))
    weight = inputs[2]
    for function in (triton_project_slots, triton_project_and_combine):
        output = function(weight.new_zeros(0, case.f), weight, order)
        assert output.shape == (0, case.h)


def test_no_number_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch is asked for it; tests/gpu/test_triton_experts.py asks CUDA."""
    _, order, inputs = small()
    with monkeypatch.context() as patch:
        for name in (
            "item",
            "tolist",
            "numpy",
            "cpu",
            "nonzero",
            "__bool__",
            "__int__",
            "__index__",
        ):
            patch.setattr(Tensor, name, lambda *_: pytest.fail("the host waits for the device"))
        with pytest.raises(pytest.fail.Exception, match="the host waits"):
            order.tokens_per_expert.tolist()
        output = routed(inputs, order)
        gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert all(torch.isfinite(each).all() for each in gradients)


# numpy, which is the interpreter's arithmetic, warns of infinity minus infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("_smallest_tiles")
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", LIMITS, ids=str)
def test_weight_gradients_are_written_or_added_in_place(
    out_dtype: torch.dtype, accumulate: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    counts, m, n = [20, 0, 3], 18, 33
    left = random(generator, 23, m, dtype=torch.bfloat16).detach()
    right = random(generator, 23, n, dtype=torch.bfloat16).detach()
    # The rows of one expert must not reach another's, not even times zero.
    left[20:] = torch.inf
    before = random(generator, 3, m, n, dtype=out_dtype).detach()
    out = before.clone() if accumulate else torch.full_like(before, torch.nan)
    rows = SortedRows(counts=torch.tensor(counts, device=DEVICE), number=23, index=None)
    grouped_weight_gradient(
        left, right, rows, read_left="place", read_right="place", out=out, accumulate=accumulate
    )
    base = before.double() if accumulate else torch.zeros_like(before).double()
    expected = base[0] + left[:20].double().T @ right[:20].double()
    # One rounding, of out's dtype; fp32 as in LIMITS.
    limit = 2e-6 if out_dtype == torch.float32 else 2.0**-7
    assert (out[0].double() - expected).norm() <= limit * expected.norm()
    assert torch.equal(out[1].double(), base[1])
    assert not torch.isfinite(out[2]).any()


def test_an_out_that_does_not_fit_is_refused() -> None:
    rows = SortedRows(counts=torch.tensor([2]), number=2, index=None)
    for out in (torch.zeros(3, 5), torch.zeros(4, 3).T):
        with pytest.raises(ValueError, match=re.escape("needs as many elements, contiguous")):
            grouped_weight_gradient(
                torch.ones(2, 3),
                torch.ones(2, 4),
                rows,
                read_left="place",
                read_right="place",
                out=out,
                accumulate=True,
            )


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, order, inputs = small()
    monkeypatch.setattr(triton_jit, "triton", None)
    assert is_available()[0] is False
    with pytest.raises(ValueError, match=re.escape("pip install 'megatron-moe[triton]'")):
        routed(inputs, order)


def test_without_gpu_and_interpreter_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_jit, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape("set TRITON_INTERPRET=1 before Python starts")):
        triton_projection(torch.ones(2, 3), torch.ones(1, 4, 3), torch.tensor([2]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="tensors are on cpu; use expert_backend 'grouped'"):
        triton_projection(torch.ones(2, 3), torch.ones(1, 4, 3), torch.tensor([2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(5, 8).double()}, "multiplies bfloat16 and float32, not torch.float64"),
        ({0: torch.ones(40)}, "rows of experts are (40,); they must be [t, n]"),
        ({2: torch.ones(3, 8, 4).bfloat16()}, "weight2 is torch.bfloat16, its rows are torch."),
        ({1: torch.ones(3, 2, 5, 8)}, "weight1 (3, 2, 5, 8) and weight2 (3, 8, 4) must be [el,"),
        ({3: torch.ones(5)}, "there are 5 router weights for 10 rows; give as many"),
        ({0: torch.ones(4, 8), 3: torch.ones(4, 2)}, "the order is of 10 rows, but there are 8"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[int, Tensor], message: str) -> None:
    _, order, inputs = small()
    for number, each in changes.items():
        inputs[number] = each.to(DEVICE)
    with pytest.raises(ValueError, match=re.escape(message)):
        routed(inputs, order)


def test_a_matrix_that_does_not_fit_its_rows_is_refused() -> None:
    rows, weight = torch.ones(2, 3, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=re.escape("weight (1, 3, 4) must be [el, m, n], with")):
        triton_projection(rows, weight, torch.tensor([2]))
