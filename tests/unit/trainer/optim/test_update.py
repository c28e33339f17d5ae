"""Norm, clipping and copies of weights against loops over tensors, and what the host waits for."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import optimizer as core_optimizer
from torch import Tensor

from megatron.trainer.loop import train
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.optim.adamw import AdamW
from megatron.trainer.optim.update import norm_of, squared_norms
from megatron.trainer.state import TrainState
from megatron.trainer.step import train_step
from tests.reads import ReadCounter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(all_gather_into|reduce_scatter)_tensor.:FutureWarning"),
]

StateMaker = Callable[..., TrainState]
SHARDED_BF16 = {"bf16": True, "use_distributed_optimizer": True}
PRECISIONS: list[dict[str, Any]] = [{}, {"bf16": True}, SHARDED_BF16]
IDS = ["fp32", "bf16", "bf16-distributed"]


def gradients(state: TrainState) -> list[Tensor]:
    """The accumulated gradients of all weights."""
    return [vars(p)["main_grad"] for model in state.modules for p in model.parameters()]


@pytest.mark.parametrize("precision", PRECISIONS, ids=IDS)
def test_norm_is_that_of_all_gradients(precision: dict[str, Any], make_state: StateMaker) -> None:
    state = make_state(num_layers=1, clip_grad=0, **precision)
    found = train_step(state, NEXT_TOKEN).grad_norm
    squares = [float(gradient.double().square().sum()) for gradient in gradients(state)]
    # fp32 sums of up to 6,000 squares, a tree each.
    assert found == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    assert len(squares) > 10
    # The same bits as megatron-core's, which sums experts and the rest one after the other.
    sums = squared_norms(state.optimizer, torch.device("cpu")).tolist()
    assert len(sums) == (1 if "use_distributed_optimizer" in precision else 2)
    assert norm_of(sums) == state.optimizer.get_grad_norm() == found


def test_rank_without_gradients_adds_nothing(make_state: StateMaker) -> None:
    state = make_state(num_layers=1)
    state.optimizer.zero_grad()
    found = squared_norms(state.optimizer, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert norm_of(found.tolist()) == 0.0


@pytest.mark.parametrize("settings", [{}, SHARDED_BF16, {"optimizer": "rmsprop"}])
def test_clipped_gradients_are_scaled_once(
    settings: dict[str, Any], make_state: StateMaker
) -> None:
    kept = make_state(num_layers=1, clip_grad=0, **settings)
    norm = train_step(kept, NEXT_TOKEN).grad_norm
    whole = [gradient.clone() for gradient in gradients(kept)]
    clipped = make_state(num_layers=1, clip_grad=norm / 3, **settings)
    assert train_step(clipped, NEXT_TOKEN).grad_norm == norm
    factor = norm / 3 / (norm + 1e-6)
    for before, after in zip(whole, gradients(clipped), strict=True):
        # Two roundings of fp32, 6e-8 each.
        torch.testing.assert_close(after, before * factor, rtol=2e-7, atol=0)
    assert all(each.grad_scale is None for each in inner_optimizers(clipped))


def inner_optimizers(state: TrainState) -> list[AdamW]:
    return [inner.optimizer for inner in state.optimizer.chained_optimizers]


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=IDS[1:])
def test_models_weights_are_the_rounded_ones_in_one_copy(
    precision: dict[str, Any], make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(num_layers=1, **precision)
    calls: list[int] = []
    copy = torch._foreach_copy_

    def counted(weights: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(len(weights))
        copy(weights, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    monkeypatch.setattr(core_optimizer, "_multi_tensor_copy_this_to_that", None)
    before = {name: p.clone() for name, p in state.modules[0].named_parameters()}
    train_step(state, NEXT_TOKEN)
    assert len(calls) == 2  # dense and experts
    narrow = 0
    for name, p in state.modules[0].named_parameters():
        if p.dtype == torch.bfloat16:
            narrow += 1
            main: Tensor = vars(p)["main_param"]
            assert torch.equal(p.flatten(), main.detach().bfloat16().flatten()), name
        assert not torch.equal(p, before[name]), name
    assert sum(calls) == narrow > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {**SHARDED_BF16, "spike_sigma": 5, "moe_router_enable_expert_bias": True}],
    ids=["fp32", "bf16-guarded"],
)
def test_host_waits_once_a_step(settings: dict[str, Any], make_state: StateMaker) -> None:
    """In a turn of the loop between log lines, whatever the number of tensors."""
    state = make_state(num_layers=2, train_iters=2, log_interval=9, **settings)
    with ReadCounter() as reads:
        train(state, NEXT_TOKEN, hooks=[])
    expected = {"megatron/trainer/step.py _measure": 2, "megatron/trainer/step.py evaluate": 1}
    assert dict(reads.sites) == expected


def test_notice_of_the_ranks_is_read_with_the_loss(
    make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(num_layers=1)
    reduced = dist.all_reduce

    def with_another_rank(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        done = reduced(tensor, *arguments, **named)
        if named.get("op") == dist.ReduceOp.MAX:
            tensor.clamp_(min=30.0)
        return done

    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    with ReadCounter() as reads:
        notices = [
            train_step(state, NEXT_TOKEN, notice=iter((n,)).__next__).notice for n in (0, 31)
        ]
    assert notices == [30, 31]
    assert dict(reads.sites) == {"megatron/trainer/step.py _measure": 2}


def test_all_ranks_judge_the_numbers_of_the_first(
    make_state: StateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica's norm may differ in its last digit, and would decide otherwise about a spike."""
    state = make_state(num_layers=1, spike_sigma=4)
    of_first: list[float] = []

    def broadcast(tensor: Tensor, src: int) -> None:
        assert src == 0
        tensor.mul_(1 + 1e-6)
        of_first.extend(tensor.tolist())

    monkeypatch.setattr(dist, "broadcast", broadcast)
    result = train_step(state, NEXT_TOKEN)
    _, dense, experts, total, count = of_first
    assert (result.grad_norm, result.loss) == (norm_of((dense, experts)), total / count)
