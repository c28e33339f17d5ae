"""Signals, time limits and intervals stop a run."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron.trainer.config.schema import ReliabilityConfig, RunConfig
from megatron.trainer.health import stop
from megatron.trainer.health.stop import Stop, StopRule
from megatron.trainer.runtime import signals


@pytest.fixture(autouse=True)
def no_listening() -> Iterator[None]:
    yield
    signals.stop_listening()


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rule(*, train_iters: int = 100, iteration: int = 0, **flags: float) -> StopRule:
    cfg = RunConfig(reliability=ReliabilityConfig(**flags))  # type: ignore[arg-type]
    return StopRule(cfg, device=torch.device("cpu"), iteration=iteration, last=train_iters)


def test_signal_stops_the_run_for_good(world: None) -> None:
    made = rule()
    signals.listen()
    assert made.check(3) is None
    os.kill(os.getpid(), signal.SIGTERM)
    stopped = made.check(4)
    assert stopped == Stop(reason="signal", detail="SIGTERM received")
    assert stopped.requeue
    signals.stop_listening()
    assert made.check(5) == made.stop == stopped


def test_duration_counts_from_the_start_of_the_process(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rule(exit_duration_in_mins=2.0)
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 20)
    assert made.check(3) is None
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 120)
    assert made.check(4) == Stop(reason="duration", detail="--exit-duration-in-mins 2 are over")
    assert stop.Stop(reason="duration", detail="").requeue


def test_interval_stops_at_its_multiples_but_not_where_the_run_began_or_ends(world: None) -> None:
    made = rule(exit_interval=5, iteration=10, train_iters=15)
    assert [made.check(iteration) for iteration in (10, 11, 12, 13, 14, 15)] == [None] * 6
    made = rule(exit_interval=5, iteration=10)
    assert made.check(15, is_evaluating=True) is None
    stopped = made.check(15)
    assert stopped == Stop(reason="interval", detail="--exit-interval 5")
    assert not stopped.requeue


def test_ranks_are_asked_again_only_where_no_step_has_told(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other of two ranks has got SIGUSR1; this one, whose time is over, has not."""
    made = rule(exit_duration_in_mins=2.0)
    asked: list[int] = []

    def with_another_rank(noted: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        assert op == dist.ReduceOp.MAX
        asked.append(int(noted))
        noted.clamp_(min=2 * signal.SIGUSR1)

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    made.hear(0)
    assert made.check(1) is None and asked == []
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 120)
    assert made.notice() == 1
    made.hear(0)
    made.forget()  # an evaluation or a save went by
    told = Stop(reason="signal", detail="SIGUSR1 received")
    assert made.check(2) == told and asked == [1]
    assert made.check(3) == told and asked == [1]
    other = rule(exit_duration_in_mins=2.0)
    other.hear(2 * signal.SIGTERM + 1)
    assert other.check(1) == Stop(reason="signal", detail="SIGTERM received")


def test_lone_rank_asks_nobody(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", None)
    assert rule(exit_duration_in_mins=1e-6).check(1) is not None
