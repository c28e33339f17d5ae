"""Compares the cute backend on a GPU at the models' sizes with float64, as triton's test does."""

import pytest
import torch
from torch import Tensor

from moe_ext.experts import EXPERT_BACKENDS, Use, cute_trial
from tests.gpu.test_triton_experts import SIZES, assert_near, order_of, random, run
from tests.gpu.waits import no_synchronisation

pytestmark = pytest.mark.gpu

CUTE, LOOP = EXPERT_BACKENDS["cute"], EXPERT_BACKENDS["loop"]


@pytest.fixture(autouse=True, scope="module")
def _usable() -> None:
    """Skips where the backend says that it cannot be used, but not where its trial says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_ext.experts.cute_use._trial_problem", lambda _device: None)
        problem = CUTE.problem(
            Use(
                device_type="cuda",
                dtype=torch.bfloat16,
                widths=(2048,),
                capability=torch.cuda.get_device_capability(),
            )
        )
    if problem is not None:
        pytest.skip(f"'cute' {problem}")


def test_the_trial_passes() -> None:
    assert cute_trial.find_problem(torch.device("cuda")) is None


@pytest.mark.parametrize("name", SIZES)
def test_routed_experts_equal_float64_with_all_gradients(name: str) -> None:
    torch.manual_seed(0)
    tokens, experts, k, h, f = SIZES[name]
    order = order_of(tokens, experts, k)
    gates = torch.rand(tokens, k, device="cuda").requires_grad_()
    inputs = [random(tokens, h), random(experts, 2, f, h, std=h**-0.5)]
    inputs += [random(experts, h, f, std=f**-0.5), gates]
    upstream = torch.randn(tokens, h, device="cuda")

    def routed(x: Tensor, w1: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
        return CUTE.routed_experts(x, w1, w2, order, gates)

    doubles = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(
        lambda x, w1, w2, g: LOOP.routed_experts(x, w1, w2, order, g), doubles, upstream.double()
    )
    run(routed, inputs, upstream)  # kernels are compiled, which may synchronise
    with no_synchronisation():
        actual = run(routed, inputs, upstream)
    assert_near(actual, exact)
    buffers = [torch.ones_like(each, dtype=torch.float32) for each in inputs[1:3]]
    for weight, buffer in zip(inputs[1:3], buffers, strict=True):
        weight.main_grad, weight.grad_added_to_main_grad = buffer, False  # type: ignore[attr-defined]
    for _ in range(2):
        run(routed, inputs, upstream)
    assert_near([buffer - 1 for buffer in buffers], [2 * each for each in exact[2:4]])


@pytest.mark.parametrize("kind", ["project_slots", "project_and_combine"])
def test_projections_of_moa_equal_float64_with_all_gradients(kind: str) -> None:
    torch.manual_seed(0)
    tokens, experts, k, h, width = 1024, 8, 2, 2048, 2048
    order = order_of(tokens, experts, k)
    inputs = [random(tokens if kind == "project_slots" else tokens * k, h)]
    inputs.append(random(experts, width, h, std=h**-0.5))
    upstream = torch.randn(tokens * k if kind == "project_slots" else tokens, width, device="cuda")

    def product(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = getattr(CUTE, kind)(x, weight, order)
        return output

    doubles = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(lambda x, w: getattr(LOOP, kind)(x, w, order), doubles, upstream.double())
    run(product, inputs, upstream)
    with no_synchronisation():
        actual = run(product, inputs, upstream)
    assert_near(actual, exact)


@pytest.mark.parametrize("counts", [[40, 0, 3, 200], [0, 0, 1, 0], [0, 0, 0, 0], [500, 1, 1, 1]])
def test_sorted_rows_of_any_number_equal_float64(counts: list[int]) -> None:
    """Rows from other ranks, whose number differs from call to call."""
    torch.manual_seed(0)
    sizes, number = torch.tensor(counts, device="cuda"), sum(counts)
    probs = torch.rand(number, device="cuda").requires_grad_()
    inputs = [random(number, 128), random(4, 2, 64, 128, std=0.1), random(4, 128, 64, std=0.1)]
    inputs.append(probs)
    upstream = torch.randn(number, 128, device="cuda")
    actual = run(lambda x, w1, w2, p: CUTE.experts(x, w1, w2, sizes, p), inputs, upstream)
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    exact = run(lambda x, w1, w2, p: LOOP.experts(x, w1, w2, sizes, p), doubles, upstream.double())
    if number:
        assert_near(actual, exact)
    else:
        assert all(torch.equal(a.double(), b) for a, b in zip(actual, exact, strict=True))
