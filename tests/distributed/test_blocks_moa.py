"""Attention experts split over two gloo ranks against the whole on one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.launcher import ranks

WORKER = Path(__file__).with_name("blocks_moa_worker.py")
SEQUENCE, BATCH, WIDTH, GROUPS, HEAD_SIZE, EXPERTS = 6, 2, 8, 2, 4, 5

Results = dict[str, dict[str, Tensor]]
"""What one rank computed, by case."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    directory = tmp_path_factory.mktemp("moa")
    generator = torch.Generator().manual_seed(0)
    heads = GROUPS * HEAD_SIZE
    shapes = {
        "hidden": (SEQUENCE, BATCH, WIDTH),
        "upstream": (SEQUENCE, BATCH, WIDTH),
        "router.weight": (EXPERTS, WIDTH),
        "linear_kv.weight": (2 * heads, WIDTH),
        "experts.weight_q": (EXPERTS, heads, WIDTH),
        "experts.weight_o": (EXPERTS, WIDTH, heads),
        "output_bias": (WIDTH,),
        "angles": (SEQUENCE, 1, 1, HEAD_SIZE),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    torch.save(inputs, directory / "inputs.pt")
    done = ranks(2, WORKER, str(directory))
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    # float64; ranks only add in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11, msg=name)


def assert_gradients(ranks: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> None:
    """Split weights: the ranks' windows side by side. Others: the same on both."""
    names = [name for name in truth if name.startswith("grad ") and name != "grad hidden"]
    assert len(names) == 5
    for name in names:
        first, second = (rank[name] for rank in ranks)
        is_split = "experts." in name or "linear_kv." in name
        if not is_split:
            assert_equal(second, truth[name], name)
        assert_equal(first + second if is_split else first, truth[name], name)


def test_split_sequences_have_the_output_and_gradients_of_the_whole(results: list[Results]) -> None:
    truth = results[0]["whole"]
    ranks = [result["sequence_parallel"] for result in results]
    for name in ("output", "grad hidden"):
        assert_equal(torch.cat([rank[name] for rank in ranks]), truth[name], name)
    assert_gradients(ranks, truth)


def test_split_heads_alone_have_the_output_and_gradients_of_the_whole(
    results: list[Results],
) -> None:
    truth = results[0]["whole"]
    ranks = [result["tensor_parallel"] for result in results]
    for rank in ranks:
        for name in ("output", "grad hidden", "one token"):
            assert_equal(rank[name], truth[name], name)
    assert_gradients(ranks, truth)


@pytest.mark.parametrize("case", ["sequence_parallel", "tensor_parallel"])
def test_split_routers_report_what_the_whole_reports(results: list[Results], case: str) -> None:
    for result in results:
        for name in ("losses", "load"):
            assert_equal(result[case][name], result["whole"][name], name)
