"""Holds benchmarks to new data for every sample, the same for all implementations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import session
from benchmarks.digests import Digests
from benchmarks.layer_problem import LayerProblem, LayerSubject
from benchmarks.memory import PeakMemory
from benchmarks.session import Plan, Session
from benchmarks.shapes import SHAPES
from benchmarks.workers import Entry, answer

CPU = torch.device("cpu")


class Numbers:
    """Records the numbers that samples are taken on."""

    def check(self) -> tuple[float, Digests]:
        return 0.0, {}

    def sample(self, number: int) -> dict[str, float]:
        return {"number": number, "flops_per_second": 1.0, "copy_bytes_per_second": 1.0}


class WorkerHere:
    """Serves an entry in this process, as a worker does in its own."""

    def __init__(self, entry: Entry, *, device: torch.device, num_threads: int | None) -> None:
        del num_threads
        self._subject, self._memory = entry.build(device, *entry.arguments), PeakMemory(device)

    def call(self, command: str, *arguments: int) -> Any:
        return answer(command, arguments, self._subject, self._memory)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_fresh", [False, True])
def test_every_sample_is_of_new_data_the_same_for_all(
    is_fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is rebuilt does not begin with the first batch again."""
    monkeypatch.setattr(session, "Worker", WorkerHere)
    monkeypatch.setattr(session, "build_ceilings", lambda *_: Numbers())
    entry = Entry(lambda _device: Numbers(), ())
    plan = Plan(
        entries={"native": entry, "native:other": entry}, device=CPU, dtype=torch.float32,
        rounds=3, warmup=2, gemm_size=8, is_fresh=is_fresh,
    )  # fmt: skip
    timed = Session(plan)
    timed.run()
    # A fresh worker warms up on two more numbers at each visit.
    expected = [2, 5, 8] if is_fresh else [2, 3, 4]
    assert [each.series("number") for each in timed.found.values()] == [expected] * 2


class Transposed(LayerSubject):
    """Passes hidden states on, [b, s, h], and keeps what it was given."""

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.transpose(0, 1)

    def take_routing(self) -> None:
        self.taken = self.problem.routing

    def forward(self) -> torch.Tensor:
        return 2 * self.hidden

    def leaves(self) -> Iterator[torch.Tensor]:
        return iter(())

    def gradients(self) -> dict[str, torch.Tensor]:
        return {}


def test_sample_of_a_layer_is_on_the_data_of_its_number() -> None:
    """Compares with a problem that had no other data before."""
    given = (SHAPES["jetmoe_toy"], "learned", CPU, torch.float32)
    layer, expected = Transposed(LayerProblem(*given)), LayerProblem(*given)
    seen = []
    for number in (0, 5, 3):
        layer.sample(number)
        expected.renew(number)
        assert torch.equal(layer.hidden.detach().transpose(0, 1), expected.hidden)
        assert torch.equal(layer.hidden.grad.transpose(0, 1), 2 * expected.upstream)  # type: ignore[union-attr]
        assert torch.equal(layer.taken.experts, expected.routing.experts)
        assert torch.equal(layer.taken.gates, expected.routing.gates)
        seen.append((layer.taken.experts.sum().item(), layer.hidden.sum().item()))
    assert len(set(seen)) == 3
