"""Experts made of dense matrices, compared with loops over rows and with the plain function."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.upcycling import NOISE_STD, Upcycling

H, F = 6, 40
DENSE = MoEModelConfig(
    num_layers=2, hidden_size=H, num_attention_heads=2, num_experts=None, ffn_hidden_size=F
)


@pytest.fixture
def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2 * F, H, generator=generator), torch.randn(H, F, generator=generator)


def feed_forward(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_expert_is_its_part_of_the_rows(granularity: int, matrices: tuple[Tensor, Tensor]) -> None:
    fc1, fc2 = matrices
    rule = Upcycling(num_experts=8, topk=4, granularity=granularity)
    width = F // granularity
    for expert in range(8):
        into, out = rule.expert(1, expert, fc1, fc2)
        first = expert % granularity * width
        assert torch.equal(into[0], torch.stack([fc1[first + row] for row in range(width)]))
        assert torch.equal(into[1], torch.stack([fc1[F + first + row] for row in range(width)]))
        assert torch.equal(out, torch.stack([fc2[:, first + row] for row in range(width)], dim=1))
    assert rule.model(DENSE).moe_ffn_hidden_size == width
    assert rule.model(DENSE).router == "softmax_topk"


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_output_is_the_dense_one_times_the_sum_of_gates(
    granularity: int, preserve: bool, shared: bool, matrices: tuple[Tensor, Tensor]
) -> None:
    fc1, fc2 = (matrix.double() for matrix in matrices)
    rule = Upcycling(
        num_experts=8,
        topk=4,
        granularity=granularity,
        preserve_function=preserve,
        shared=shared,
        seed=5,
    )
    always = [matrix.double() for matrix in rule.shared_expert(fc1, fc2)]
    experts = [rule.expert(0, expert, fc1, fc2) for expert in range(8)]
    router = rule.router(0, H, 1.0).double()
    hidden = torch.randn(20, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = feed_forward(hidden, fc1[:F], fc1[F:], fc2)
    scale = rule.gate_sum(hidden @ router.T)
    for token, (row, expected) in enumerate(zip(hidden, dense, strict=True)):
        probabilities = (router @ row).softmax(0)
        chosen = sorted(range(8), key=lambda expert: -float(probabilities[expert]))[:4]
        total = sum(float(probabilities[expert]) for expert in chosen) if preserve else 1.0
        output = torch.zeros(H, dtype=torch.float64)
        if shared:
            output += feed_forward(row, always[0][:F], always[0][F:], always[1])
        for expert in chosen:
            into, out = (matrix.double() for matrix in experts[expert])
            output += probabilities[expert] / total * feed_forward(row, into[0], into[1], out)
        torch.testing.assert_close(output, expected * float(scale[token]), rtol=1e-5, atol=1e-5)
    wide = rule.model(DENSE).moe_shared_expert_intermediate_size
    assert wide == (F if shared else None)
    assert torch.all(scale == 1) if preserve else torch.all((scale < 1) == (not shared))


def test_parts_of_a_copy_share_a_row_of_the_router() -> None:
    rule = Upcycling(num_experts=8, topk=4, granularity=4, seed=5)
    rows = rule.router(1, 2000, 0.02)
    assert rows.shape == (8, 2000)
    assert all(torch.equal(rows[expert], rows[expert // 4 * 4]) for expert in range(8))
    assert not torch.equal(rows[0], rows[4])
    assert not torch.equal(rows, rule.router(0, 2000, 0.02))
    assert torch.equal(
        rows, Upcycling(num_experts=8, topk=4, granularity=4, seed=5).router(1, 2000, 0.02)
    )
    assert float(rows.std()) == pytest.approx(0.02, rel=0.05)
    assert float(rows.abs().max()) > 3 * 0.02  # not truncated


def test_noise_replaces_its_share_of_each_expert_anew(matrices: tuple[Tensor, Tensor]) -> None:
    fc1, fc2 = torch.ones(2 * F, 500), torch.ones(500, F)
    rule = Upcycling(num_experts=2, topk=1, noise=0.3)
    changed = []
    for expert in range(2):
        for matrix in rule.expert(0, expert, fc1, fc2):
            is_new = matrix != 1
            assert float(is_new.float().mean()) == pytest.approx(0.3, abs=0.02)
            assert float(matrix[is_new].std()) == pytest.approx(NOISE_STD, rel=0.05)
            assert float(matrix[is_new].mean()) == pytest.approx(0.0, abs=0.002)
        changed.append(rule.expert(0, expert, fc1, fc2)[0])
    assert not torch.equal(changed[0], changed[1])


def test_drop_redraws_the_same_width_of_all_three_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    fc1 = 3 + 0.5 * torch.randn(2 * F, 300, generator=generator)
    fc1[F:] -= 6
    fc2 = 0.1 * torch.randn(300, F, generator=generator)
    into, out = Upcycling(num_experts=2, topk=1, drop=0.25).expert(0, 1, fc1, fc2)
    rows = [
        {row for row in range(F) if not torch.equal(into[i][row], fc1[i * F + row])} for i in (0, 1)
    ]
    columns = {column for column in range(F) if not torch.equal(out[:, column], fc2[:, column])}
    assert rows[0] == rows[1] == columns and len(columns) == F // 4
    for matrix, mean, std in ((into[0], 3, 0.5), (into[1], -3, 0.5), (out.T, 0, 0.1)):
        drawn = matrix[sorted(columns)]
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.1)
        assert float(drawn.std()) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "dense", "problem"),
    [
        ({"granularity": 3, "num_experts": 6, "topk": 3}, {}, r"ffn_hidden_size \(40\) must be a"),
        ({"granularity": 4, "num_experts": 6, "topk": 4}, {}, r"num_experts \(6\) must be a"),
        ({"granularity": 2, "num_experts": 6, "topk": 3}, {}, r"topk \(3\) must be a positive mul"),
        ({"num_experts": 2, "topk": 3}, {}, r"topk \(3\) must be at most num_experts \(2\)"),
        ({"num_experts": 2, "topk": 1}, {"num_experts": 4}, "has num_experts 4; only a dense one"),
    ],
)
def test_what_cannot_be_made_is_refused(
    rule: dict[str, Any], dense: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Upcycling(**rule).model(MoEModelConfig(**{**vars(DENSE), **dense}))
