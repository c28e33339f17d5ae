"""Holds benchmarks to new data for every sample, the same for all implementations."""

from collections.abc import Iterator
from typing import Any, ClassVar

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
    """Records the numbers that samples are taken on, and when caches are given back."""

    seen: ClassVar[list[str]] = []

    def check(self) -> tuple[float, Digests]:
        return 0.0, {}

    def sample(self, number: int) -> dict[str, float]:
        self.seen.append("sample")
        return {"number": number, "flops_per_second": 1.0, "copy_bytes_per_second": 1.0}

    def release(self) -> None:
        self.seen.append("release")


class WorkerHere:
    """Serves an entry in this process, as a worker does in its own."""

    def __init__(self, entry: Entry, *, device: torch.device, num_threads: int | None) -> None:
        del num_threads
        self._subject, self._memory = entry.build(device, *entry.arguments), PeakMemory(CPU)

    def call(self, command: str, *arguments: int, timeout_s: float | None = None) -> Any:
        assert timeout_s is None, "the project's own have no limit"
        return answer(command, arguments, self._subject, self._memory)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("is_fresh", "device", "expected"),
    [
        (False, "cpu", [2, 3, 4]),
        # A fresh worker warms up on two more numbers at each visit.
        (True, "cpu", [2, 5, 8]),
        # One that gave its caches back at the end of a visit takes another sample first.
        (False, "cuda", [3, 5, 7]),
        (True, "cuda", [2, 5, 8]),
    ],
)
def test_every_sample_is_of_new_data_the_same_for_all(
    is_fresh: bool, device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is rebuilt does not begin with the first batch again."""
    monkeypatch.setattr(session, "Worker", WorkerHere)
    monkeypatch.setattr(Numbers, "seen", [])
    monkeypatch.setattr(session, "build_ceilings", lambda *_: Numbers())
    entry = Entry(lambda _device: Numbers(), ())
    plan = Plan(
        entries={"native": entry, "native:other": entry}, device=torch.device(device),
        dtype=torch.float32, rounds=3, warmup=2, gemm_size=8, is_fresh=is_fresh, peer_timeout_s=1.0,
    )  # fmt: skip
    timed = Session(plan)
    timed.run()
    assert [each.series("number") for each in timed.found.values()] == [expected] * 2
    visits = 3 * 3 + (0 if is_fresh else 2)  # of two implementations and the ceilings
    assert Numbers.seen.count("release") == (visits if device == "cuda" else 0)
    assert device == "cpu" or Numbers.seen[-1] == "release"


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
    layer.release()
    assert layer.hidden.grad is None  # a GPU's memory is for others meanwhile
