"""RMSNorm against its formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_ext.layers.norm import RMSNorm

ConfigMaker = Callable[..., TransformerConfig]


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def test_output_and_gradients_equal_the_formula(make_config: ConfigMaker) -> None:
    norm = RMSNorm(make_config(), 8, eps=1e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_()
    hidden = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 2, 8, dtype=torch.float64)
    inputs = (hidden, norm.weight)
    output, expected = norm(hidden), formula(hidden, norm.weight, 1e-3)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for grad, truth in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-12)


def test_bf16_takes_statistics_in_fp32_and_casts_back_before_the_weight(
    make_config: ConfigMaker,
) -> None:
    norm = RMSNorm(make_config(params_dtype=torch.bfloat16), 8)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = hidden.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = (wide * scale).bfloat16() * norm.weight
    assert torch.equal(norm(hidden), expected)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_says_whether_sequences_are_split(
    make_config: ConfigMaker, sequence_parallel: bool
) -> None:
    config = make_config()
    config.sequence_parallel = sequence_parallel
    weight: Any = RMSNorm(config, 8).weight
    assert weight.sequence_parallel is sequence_parallel


def test_it_accepts_what_megatron_core_passes_and_builds_on_the_meta_device(
    make_config: ConfigMaker,
) -> None:
    with torch.device("meta"):
        norm = RMSNorm(config=make_config(), hidden_size=8, eps=1e-6, normalization="RMSNorm")
    assert norm.weight.is_meta
    assert norm.eps == 1e-6
