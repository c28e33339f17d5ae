"""Compares expert backends on a GPU with the loop: values, gradients, experts without tokens."""

import pytest
import torch

from moe_ext.experts import EXPERT_BACKENDS, Use

pytestmark = pytest.mark.gpu

WIDTH, FFN = 64, 32


@pytest.mark.parametrize("name", ["grouped", "triton", "cute", "megablocks", "te"])
@pytest.mark.parametrize("counts", [[40, 1, 30, 20], [0, 61, 0, 40], [0, 0, 1, 0], [0, 0, 0, 0]])
def test_backends_equal_the_loop_in_bf16_with_all_gradients(counts: list[int], name: str) -> None:
    use = Use(device_type="cuda", dtype=torch.bfloat16, widths=(WIDTH, FFN))
    problem = EXPERT_BACKENDS[name].problem(use)
    if problem is not None:
        pytest.skip(f"'{name}' {problem}")
    generator = torch.Generator("cuda").manual_seed(0)
    t, e = sum(counts), len(counts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda") * shape[-1] ** -0.5

    inputs = [random(t, WIDTH), random(e, 2, FFN, WIDTH), random(e, WIDTH, FFN)]
    inputs = [x.bfloat16().requires_grad_() for x in inputs]
    probs = torch.rand(t, generator=generator, device="cuda").requires_grad_()
    hidden, weight1, weight2 = inputs

    def run(backend: str) -> list[torch.Tensor]:
        sizes = torch.tensor(counts)
        output = EXPERT_BACKENDS[backend].experts(hidden, weight1, weight2, sizes, probs)
        gradients = torch.autograd.grad(output, [*inputs, probs], torch.ones_like(output))
        return [output, *gradients]

    for a, b in zip(run(name), run("loop"), strict=True):
        assert torch.isfinite(a).all()
        if b.numel():
            # Intermediate gradients are rounded to bf16 (2^-8) at different points.
            torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item() + 1e-6)
