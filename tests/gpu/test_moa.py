"""Tests attention experts on a GPU: grouped GEMM against loop, host syncs, a small JetMoE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_app.pretrain import command
from moe_ext.experts import EXPERT_BACKENDS
from moe_ext.experts.slots import sort_by_expert
from moe_ext.functional import sort_choices, topk_softmax
from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import flags
from tests.gpu.waits import no_synchronisation

pytestmark = pytest.mark.gpu

INPUTS, OUTPUTS = 64, 32


@pytest.mark.parametrize("counts", [[40, 1, 30, 20], [0, 61, 0, 40], [0, 0, 1, 0], [0, 0, 0, 0]])
def test_grouped_projection_equals_loop_in_bf16_with_all_gradients(counts: list[int]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rows, weight = (
        (torch.randn(shape, generator=generator, device="cuda") * INPUTS**-0.5)
        .bfloat16()
        .requires_grad_()
        for shape in ((sum(counts), INPUTS), (len(counts), OUTPUTS, INPUTS))
    )

    def run(backend: str) -> list[torch.Tensor]:
        project = EXPERT_BACKENDS[backend].projection
        assert project is not None
        output = project(rows, weight, torch.tensor(counts))
        return [output, *torch.autograd.grad(output, [rows, weight], torch.ones_like(output))]

    for a, b in zip(run("grouped"), run("loop"), strict=True):
        assert torch.isfinite(a).all()
        if b.numel():
            # One GEMM each, rounded to bf16 (2^-8) once.
            torch.testing.assert_close(a, b, rtol=0, atol=0.01 * b.abs().max().item() + 1e-6)


def test_sorting_and_projecting_never_synchronises_the_host() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(50, INPUTS, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(8, OUTPUTS, INPUTS, generator=generator, device="cuda").bfloat16()
    back = torch.randn(8, INPUTS, OUTPUTS, generator=generator, device="cuda").bfloat16()
    logits = torch.randn(50, 8, generator=generator, device="cuda")
    tokens.requires_grad_()
    grouped = EXPERT_BACKENDS["grouped"]
    with no_synchronisation():
        experts = sort_choices(topk_softmax(logits, 2)).experts
        order = sort_by_expert(experts, num_experts=8)
        rows = grouped.project_slots(tokens, weight, order)
        output = grouped.project_and_combine(rows, back, order)
        output.backward(torch.ones_like(output))
    both = torch.einsum("eio,eoh->eih", back.float(), weight.float())  # [e, i, h]
    every = torch.einsum("th,eih->tei", tokens.float(), both)  # [t, e, i]
    routing_map = torch.zeros(50, 8, device="cuda").scatter(1, experts, 1.0)
    expected = (every * routing_map[..., None]).sum(1)
    # Two GEMMs of two experts, each rounded to bf16 (2^-8), and their sum.
    limit = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=limit)


def test_a_small_jetmoe_trains_in_bf16_like_in_fp32(tmp_path: Path) -> None:
    """Runs the pretrain command with widths that the grouped GEMM supports."""
    sizes = {"hidden-size": 64, "kv-channels": 16, "moe-ffn-hidden-size": 32, "train-iters": 3}

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        case = {**JETMOE, **sizes, **changes}
        assert command.main(flags(**case, save=tmp_path / name)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "lm_loss" in record]

    fp32, bf16 = run("fp32"), run("bf16", bf16=True)
    assert len(fp32) == len(bf16) == 3
    for exact, rounded in zip(fp32, bf16, strict=True):
        # bf16 rounds by up to 0.4 %; the mean over 128 tokens by less.
        assert rounded["lm_loss"] == pytest.approx(exact["lm_loss"], rel=2e-3)
        assert exact["moa_load_balancing_loss"] >= 0.99
    assert bf16[0]["grad_norm"] == pytest.approx(fp32[0]["grad_norm"], rel=2e-2)
