"""Compares fused kernels with torch's functions at the models' sizes, in bf16 on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.kernels import fused
from moe_ext.layers.head import VocabularyPart, linear_cross_entropy
from moe_ext.layers.products import accumulating_linear
from tests.gpu.test_triton_experts import no_synchronisation, random

pytestmark = pytest.mark.gpu

# A product's operands are rounded to bf16 (2^-9), independently, so this is relative to a norm.
NEAR = 1e-2


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def test_the_head_gives_what_torch_gives_without_host_synchronisation() -> None:
    torch.manual_seed(0)
    tokens, width, rows, real = 4096, 2048, 50304, 50280
    hidden, weight = random(tokens, width), random(rows, width, std=width**-0.5)
    labels = torch.randint(real, (tokens,), device="cuda")
    mask = (torch.rand(tokens, device="cuda") > 0.1).float()
    group: Any = SimpleNamespace(size=lambda: 1)
    part = VocabularyPart(first=0, number=real, num_token_ids=real, group=group)
    assert fused.takes("auto", hidden)

    def run(setting: fused.FusedKernels) -> list[Tensor]:
        losses = linear_cross_entropy(
            hidden, weight, labels, mask, part=part, fused_kernels=setting
        )
        return [losses, *torch.autograd.grad(losses, [hidden, weight], mask / tokens)]

    run("auto")  # kernels are compiled, which may synchronise
    with no_synchronisation():
        losses, *gradients = run("auto")
    again = run("auto")
    assert all(torch.equal(a, b) for a, b in zip([losses, *gradients], again, strict=True))
    expected, *of_torch = run("off")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)  # of the same logits
    for a, b in zip(gradients, of_torch, strict=True):
        assert distance(a, b) < NEAR
    assert not gradients[1][real:].any()


def test_a_weight_gradient_is_added_in_fp32_without_being_rounded() -> None:
    torch.manual_seed(0)
    rows, weight = random(4096, 1024), torch.nn.Parameter(random(2048, 1024).detach())
    before = torch.randn(2048, 1024, device="cuda")
    weight.main_grad = before.clone()  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    upstream = random(4096, 2048).detach()
    accumulating_linear(rows, weight).backward(upstream)
    exact = before.double() + upstream.double().T @ rows.detach().double()
    # A gradient rounded to bf16 first would be off by 1e-3.
    assert distance(weight.main_grad, exact) < 1e-5  # type: ignore[attr-defined]
