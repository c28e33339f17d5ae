"""The cute backend around QuACK's products, which plain torch stands in for, against the loop.

test_cute_compiled.py hands the same calls to QuACK; tests/gpu/test_cute_experts.py runs them.
"""

import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_ext.experts import (
    EXPERT_BACKENDS,
    Use,
    choose_backend,
    cute_experts,
    cute_products,
    cute_use,
)
from moe_ext.experts import cute_trial as trial
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.slots import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    sort_rows,
    sum_slots,
    unpermute_tokens,
    unsort_rows,
)
from moe_ext.kernels import triton_jit
from tests.unit.moe_ext.experts import plain_products

CUTE = EXPERT_BACKENDS["cute"]
T, K, E, H, F = 11, 2, 5, 6, 4
CHOICES = {
    "uneven": torch.tensor([[0, 3], [3, 1], [4, 0], [1, 3], [3, 0]]),  # nobody chooses 2
    "one slot": torch.tensor([[1], [1], [4]]),
    "all on one": torch.tensor([[3], [3], [3], [3]]),
    "one token": torch.tensor([[2, 0, 4]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
}
ON_HOPPER = Use(device_type="cuda", dtype=torch.bfloat16, widths=(32, 16), capability=(9, 0))


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in plain_products.NAMES:
        monkeypatch.setattr(cute_products, name, getattr(plain_products, name))


def order_of(name: str) -> ExpertOrder:
    return sort_by_expert(CHOICES[name], num_experts=E)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [each.requires_grad_() for each in drawn]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def compare(
    actual: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Output and all gradients; float64 sums of at most ten terms of order one."""
    for a, b in zip(results(actual, inputs), results(exact, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def routed(order: ExpertOrder, x: Tensor, w1: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
    return CUTE.routed_experts(x, w1, w2, order, gates)


def exact_routed(order: ExpertOrder, x: Tensor, w1: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
    rows, probs = permute_tokens(x, order), sort_rows(gates.flatten(), order)
    return unpermute_tokens(loop_experts(rows, w1, w2, order.tokens_per_expert, probs), order)


def routed_inputs(name: str) -> list[Tensor]:
    t, k = CHOICES[name].shape
    return leaves((t, H), (E, 2, F, H), (E, H, F), (t, k))


@pytest.mark.parametrize("name", CHOICES)
def test_routed_experts_equal_the_loop_with_all_gradients(name: str) -> None:
    order = order_of(name)
    compare(
        functools.partial(routed, order),
        functools.partial(exact_routed, order),
        routed_inputs(name),
    )


@pytest.mark.parametrize("counts", [[4, 1, 0, 3], [0, 0, 0, 5], [0, 0, 0, 0]])
def test_sorted_rows_equal_the_loop_with_all_gradients(counts: list[int]) -> None:
    sizes, number = torch.tensor(counts), sum(counts)
    compare(
        lambda x, w1, w2, p: CUTE.experts(x, w1, w2, sizes, p),
        lambda x, w1, w2, p: loop_experts(x, w1, w2, sizes, p),
        leaves((number, H), (4, 2, F, H), (4, H, F), (number,)),
    )
    assert CUTE.projection is not None
    compare(
        lambda x, w: cute_experts.cute_projection(x, w, sizes),
        lambda x, w: loop_projection(x, w, sizes),
        leaves((number, H), (4, F, H)),
    )


@pytest.mark.parametrize("name", CHOICES)
def test_products_of_moa_equal_the_loop_with_all_gradients(name: str) -> None:
    order, (t, k) = order_of(name), CHOICES[name].shape

    def loop(rows: Tensor, weight: Tensor) -> Tensor:
        return loop_projection(rows, weight, order.tokens_per_expert)

    compare(
        lambda x, w: CUTE.project_slots(x, w, order),
        lambda x, w: unsort_rows(loop(permute_tokens(x, order), w), order),
        leaves((t, H), (E, F, H)),
    )
    compare(
        lambda x, w: CUTE.project_and_combine(x, w, order),
        lambda x, w: unpermute_tokens(loop(sort_rows(x, order), w), order),
        leaves((t * k, H), (E, F, H)),
    )


def with_buffers(weights: list[Tensor], *, offset: int = 0) -> None:
    """Gives weights what megatron-core's DDP does, `offset` elements into an allocation."""
    for weight in weights:
        room = torch.full((weight.numel() + offset,), 2.0, dtype=torch.float64)
        weight.main_grad = room[offset:].view_as(weight)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def test_weight_gradients_are_added_to_their_buffers() -> None:
    order, inputs = order_of("uneven"), routed_inputs("uneven")
    _, _, *expected, _ = results(functools.partial(exact_routed, order), inputs)
    with_buffers(inputs[1:3])
    for _ in range(2):
        results(functools.partial(routed, order), inputs)
    for weight, gradient in zip(inputs[1:3], expected, strict=True):
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        found = weight.main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(found, 2.0 + 2 * gradient, rtol=1e-12, atol=1e-12)
        assert (found[2] == 2.0).all()  # of the expert that nobody chose


def test_a_buffer_that_tma_cannot_add_to_is_left_to_megatron_core() -> None:
    order, inputs = order_of("uneven"), routed_inputs("uneven")
    expected = results(functools.partial(exact_routed, order), inputs)
    with_buffers(inputs[1:3], offset=1)
    found = results(functools.partial(routed, order), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for weight in inputs[1:3]:
        assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert (weight.main_grad == 2.0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradients_asked_for_are_computed(
    wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, inputs = order_of("uneven"), routed_inputs("uneven")
    expected = results(functools.partial(exact_routed, order), inputs)[1 + wanted]
    made: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        def function(*arguments: object, **options: object) -> object:
            made.append(name)
            return getattr(plain_products, name)(*arguments, **options)

        return function

    for name in ("grouped_product", "grouped_weight_gradient"):
        monkeypatch.setattr(cute_products, name, noting(name))
    frozen = [each.detach() for each in inputs]
    frozen[wanted].requires_grad_()
    output = routed(order, *frozen)
    made.clear()
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (found,) = torch.autograd.grad(output, frozen[wanted], upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    products = {0: ["grouped_product"], 3: []}.get(wanted, ["grouped_weight_gradient"])
    assert made == products


def test_tokens_gates_and_the_first_product_are_kept_and_nothing_else() -> None:
    """As `triton` keeps them: no output of an expert, which would be h for each of k."""
    kept: list[Tensor] = []
    order, inputs = order_of("uneven"), routed_inputs("uneven")

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routed(order, *inputs)
    weights = {each.data_ptr() for each in inputs[1:3]}
    rows = len(order.rows)
    shapes = [tuple(each.shape) for each in kept if each.data_ptr() not in weights]
    assert shapes == [(5, H), (5, 2), (rows, 2 * F)]


def test_no_pre_activation_is_written_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    order, inputs = order_of("uneven"), routed_inputs("uneven")
    expected = exact_routed(order, *inputs)

    def unkept(*arguments: Tensor, is_kept: bool) -> object:
        assert not is_kept
        return plain_products.gated_product(*arguments, is_kept=is_kept)  # type: ignore[arg-type]

    monkeypatch.setattr(cute_products, "gated_product", unkept)
    with torch.no_grad():
        found = routed(order, *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_tokens_nothing_is_asked_of_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gradients are zero, written and added."""
    monkeypatch.undo()
    order, inputs = order_of("no token"), routed_inputs("no token")
    for found in results(functools.partial(routed, order), inputs):
        assert torch.equal(found, torch.zeros_like(found))
    for project in (CUTE.project_slots, CUTE.project_and_combine):
        (rows, weight) = leaves((0, H), (E, F, H))
        output, *gradients = results(functools.partial(_ordered, project, order), [rows, weight])
        assert output.shape == (0, F) and not gradients[1].any()
    with_buffers(inputs[1:3])
    results(functools.partial(routed, order), inputs)
    for each in inputs[1:3]:
        assert each.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert (each.main_grad == 2.0).all()  # type: ignore[attr-defined]


def _ordered(
    project: Callable[..., Tensor], order: ExpertOrder, rows: Tensor, weight: Tensor
) -> Tensor:
    return project(rows, weight, order)


@pytest.mark.parametrize(("width", "topk"), [(40, 3), (1500, 2), (8, 1)])
def test_the_kernel_adds_each_tokens_rows(
    width: int, topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    monkeypatch.undo()
    device = "cpu" if triton_jit.IS_INTERPRETED else "cuda"
    generator = torch.Generator().manual_seed(0)
    order = sort_by_expert(
        torch.rand(6, 4, generator=generator).topk(topk).indices.to(device), num_experts=4
    )
    rows = torch.randn(6 * topk, width, generator=generator).to(device)
    found = cute_products.add_rows(rows, order.places.to(torch.int32), topk)
    # fp32 sums of three terms in another order.
    torch.testing.assert_close(found, sum_slots(rows, order), rtol=1e-6, atol=1e-6)
    assert cute_products.add_rows(rows[:0], order.places[:0], topk).shape == (0, width)


def test_plans_of_shapes_long_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cute_products, "_MAX_PLANS", 2)
    plans: dict[int, int] = {}
    for number in range(7):
        cute_products._forget_plans(plans)
        plans[number] = number
    assert 6 in plans and len(plans) <= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_type": "cpu"}, "computes on a GPU, not on cpu; use 'grouped'"),
        ({"dtype": torch.float32}, "multiplies bfloat16, not torch.float32; use 'triton'"),
        ({"widths": (32, 20)}, "needs rows of a multiple of 8 numbers, but .* some of 20;"),
        ({"capability": (8, 0)}, "needs compute capability 9.0, and the GPU has 8.0; use"),
    ],
)
def test_each_limit_is_named(changes: dict[str, object], message: str) -> None:
    use = dataclasses.replace(ON_HOPPER, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^expert_backend 'cute' {message}"):
        choose_backend("cute", use)


def test_what_python_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    assert cute_use.cute_problem(ON_HOPPER) == (
        "needs Python 3.12, and this is 3.11; use 'triton' or 'grouped'"
    )
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "quack" else object()
    )
    assert cute_use.cute_problem(ON_HOPPER) == (
        "needs quack: pip install 'megatron-moe[cute]', or use 'grouped'"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cute_use.cute_problem(ON_HOPPER) == "finds no GPU; use 'grouped'"


def test_a_trial_decides_where_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cute_use, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    answers = iter(["is 0.5 off", None])
    tried: list[torch.device] = []

    def find_problem(device: torch.device) -> str | None:
        tried.append(device)
        return next(answers)

    monkeypatch.setattr(trial, "find_problem", find_problem)
    cute_use._trial_problem.cache_clear()
    for _ in range(2):  # tried once
        with pytest.raises(ValueError, match=r"^expert_backend 'cute' is 0\.5 off; use"):
            choose_backend("cute", ON_HOPPER)
    cute_use._trial_problem.cache_clear()
    assert choose_backend("cute", ON_HOPPER).reason == "named in the configuration"
    assert tried == [torch.device("cuda", 0)] * 2
    # Nothing was measured for it yet.
    assert choose_backend("auto", ON_HOPPER).name != "cute"
    cute_use._trial_problem.cache_clear()


CPU = torch.device("cpu")


def test_the_trial_passes_what_computes_right() -> None:
    assert trial.find_problem(CPU) is None


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("grouped_product", lambda *_, **__: 1 / 0, "fails here at experts over tokens (ZeroDivi"),
        (
            "add_rows",
            lambda rows, places, k: plain_products.add_rows(rows, places.flip(0), k),
            "off the result of 'loop' here at experts over tokens",
        ),
        ("grouped_weight_gradient", lambda *_, out, **__: out.fill_(torch.nan), "is nan off"),
    ],
)
def test_the_trial_tells_what_computes_wrong(
    name: str, broken: Callable[..., object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cute_products, name, broken)
    problem = trial.find_problem(CPU)
    assert problem is not None and message in problem


def test_the_trial_sees_gradients_written_over_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overwrites(*arguments: Tensor, accumulate: bool, **options: object) -> None:
        del accumulate
        plain_products.grouped_weight_gradient(*arguments, accumulate=False, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cute_products, "grouped_weight_gradient", overwrites)
    problem = trial.find_problem(CPU)
    assert problem is not None and "here at gradients added to fp32 buffers" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(40)}, "rows of experts are (40,); they must be [t, n]"),
        ({2: torch.ones(E, H, F).bfloat16()}, "weight2 is torch.bfloat16, its rows are torch."),
        ({1: torch.ones(E, 2, 9, H).double()}, "weight1 (5, 2, 9, 6) and weight2 (5, 6, 4) must"),
        ({3: torch.ones(7)}, "there are 7 router weights for 10 rows; give as many"),
        (
            {0: torch.ones(4, H).double(), 3: torch.ones(4, 2)},
            "the order is of 10 rows, but there are 8",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[int, Tensor], message: str) -> None:
    inputs = routed_inputs("uneven")
    for number, each in changes.items():
        inputs[number] = each
    with pytest.raises(ValueError, match=re.escape(message)):
        routed(order_of("uneven"), *inputs)
    with pytest.raises(ValueError, match=re.escape("weight (1, 3, 4) must be [el, m, n], with")):
        cute_experts.cute_projection(torch.ones(2, 3), torch.ones(1, 3, 4), torch.tensor([2]))
