"""Collectives that gloo alone would refuse, over two ranks, against slicing in one process."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.host_worker import SENT, SIZES, rows, weights_like
from tests.distributed.launcher import HERE, ranks

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Each rank's answers."""
    out = tmp_path_factory.mktemp("collectives")
    done = ranks(2, HERE / "host_worker.py", str(out), timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def assert_equal(found: list[Any], expected: Tensor) -> None:
    # Sums of two whole numbers: exact.
    assert torch.equal(torch.tensor(found).view(-1, 2), expected.view(-1, 2))


@pytest.mark.parametrize("kind", ["lists", "tensors", "numpy", "dispatcher"])
def test_all_to_all_exchanges_rows_and_returns_their_gradients(kind: str, answers: Answers) -> None:
    inputs = [rows(sum(SENT[rank]), rank).detach() for rank in range(2)]
    parts = [inputs[rank].split(SENT[rank]) for rank in range(2)]
    received = [torch.cat([parts[source][rank] for source in range(2)]) for rank in range(2)]
    came_from = [[SENT[source][rank] for source in range(2)] for rank in range(2)]
    back = [weights_like(received[rank], rank).split(came_from[rank]) for rank in range(2)]
    for rank in range(2):
        found = answers[rank][f"all_to_all {kind}"]
        assert_equal(found["value"], received[rank])
        assert_equal(found["gradient"], torch.cat([back[target][rank] for target in range(2)]))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gather uneven", SIZES),
        ("gather uneven tensor", SIZES),
        ("gather empty", [0, 3]),
        ("gather even", [3, 3]),
    ],
)
def test_gather_joins_parts_and_sums_their_gradients(
    name: str, sizes: list[int], answers: Answers
) -> None:
    whole = torch.cat([rows(sizes[rank], rank).detach() for rank in range(2)])
    gradient = weights_like(whole, 0) + weights_like(whole, 1)
    for rank in range(2):
        assert_equal(answers[rank][name]["value"], whole)
        assert_equal(answers[rank][name]["gradient"], gradient.split(sizes)[rank])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("reduce_scatter uneven", SIZES),
        ("reduce_scatter empty", [0, 3]),
        ("reduce_scatter even", [3, 3]),
    ],
)
def test_reduce_scatter_sums_parts_and_joins_their_gradients(
    name: str, sizes: list[int], answers: Answers
) -> None:
    total = rows(sum(sizes), 0).detach() + rows(sum(sizes), 1).detach()
    parts = total.split(sizes)
    gradient = torch.cat([weights_like(parts[rank], rank) for rank in range(2)])
    for rank in range(2):
        assert_equal(answers[rank][name]["value"], parts[rank])
        assert_equal(answers[rank][name]["gradient"], gradient)
