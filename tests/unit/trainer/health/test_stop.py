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
