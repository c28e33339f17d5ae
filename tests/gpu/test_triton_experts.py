"""Compares Triton on a GPU at the models' sizes with float64, without host synchronisation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_ext.experts import EXPERT_BACKENDS
from moe_ext.experts.slots import ExpertOrder, sort_by_expert
from tests.gpu.waits import no_synchronisation

pytestmark = pytest.mark.gpu

# tokens, experts, k, h, f
SIZES = {"olmoe": (2048, 64, 8, 2048, 1024), "jetmoe": (1024, 8, 2, 2048, 5632)}
BACKENDS = ["triton", "grouped"]


def random(*shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * std).bfloat16().requires_grad_()


def order_of(tokens: int, experts: int, k: int) -> ExpertOrder:
    """Make an order with an uneven distribution of experts, like a learned routing."""
    logits = torch.randn(tokens, experts, device="cuda") + torch.randn(experts, device="cuda")
    return sort_by_expert(logits.topk(k).indices, num_experts=experts)


def run(compute: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    output = compute(*inputs)
    return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def assert_near(actual: list[Tensor], exact: list[Tensor]) -> None:
    for a, b in zip(actual, exact, strict=True):
        # Intermediate roundings to bf16 (2^-9 each) are independent, so small relative to the norm.
        error = (a.double() - b).norm() / b.norm()
        assert error < 1e-2, f"{error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SIZES)
def test_routed_experts_equal_float64_with_all_gradients(name: str, backend: str) -> None:
    torch.manual_seed(0)
    tokens, experts, k, h, f = SIZES[name]
    order = order_of(tokens, experts, k)
    gates = torch.rand(tokens, k, device="cuda").requires_grad_()
    inputs = [random(tokens, h), random(experts, 2, f, h, std=h**-0.5)]
    inputs += [random(experts, h, f, std=f**-0.5), gates]
    upstream = torch.randn(tokens, h, device="cuda")

    def compute(backend: str) -> Callable[..., Tensor]:
        def routed(x: Tensor, w1: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
            return EXPERT_BACKENDS[backend].routed_experts(x, w1, w2, order, gates)

        return routed

    doubles = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(compute("loop"), doubles, upstream.double())
    run(compute(backend), inputs, upstream)  # kernels are compiled, which may synchronise
    with no_synchronisation():
        actual = run(compute(backend), inputs, upstream)
    assert_near(actual, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["project_slots", "project_and_combine"])
def test_projections_of_moa_equal_float64_with_all_gradients(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    tokens, experts, k, h, width = 1024, 8, 2, 2048, 2048
    order = order_of(tokens, experts, k)
    inputs = [random(tokens if kind == "project_slots" else tokens * k, h)]
    inputs.append(random(experts, width, h, std=h**-0.5))
    rows = tokens * k if kind == "project_slots" else tokens
    upstream = torch.randn(rows, width, device="cuda")

    def compute(backend: str) -> Callable[..., Tensor]:
        return lambda x, weight: getattr(EXPERT_BACKENDS[backend], kind)(x, weight, order)

    doubles = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(compute("loop"), doubles, upstream.double())
    run(compute(backend), inputs, upstream)
    with no_synchronisation():
        actual = run(compute(backend), inputs, upstream)
    assert_near(actual, exact)
