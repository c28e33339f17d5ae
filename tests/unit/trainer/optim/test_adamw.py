"""AdamW against torch's and against the paper; what decays, measured on a real model."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron.trainer.config.schema import OptimizerConfig
from megatron.trainer.optim.adamw import (
    AdamW,
    RMSprop,
    apply_schedule,
    build_optimizer,
    describe_groups,
)
from megatron.trainer.optim.wrap import wrap_model
from megatron.trainer.runtime.launch import initialize, shut_down
from megatron.trainer.state import unwrap
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from tests.distributed.launcher import flags

Rule = Literal["all", "matrices"]

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
GROUPS = ({"lr": 3e-3, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.0})
SHAPES = (((4, 3), (5,)), ((2, 2, 2), (7,), (1,)))


def new_groups(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            **settings,
            "params": [
                torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
                for shape in shapes
            ],
        }
        for settings, shapes in zip(GROUPS, SHAPES, strict=True)
    ]


def parameters(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [p for group in groups for p in group["params"]]


def set_gradients(groups: list[dict[str, Any]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters(groups):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def ours(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, lr=0.0, weight_decay=0.0, **SETTINGS)


def test_twenty_steps_of_rmsprop_equal_torchs_bit_for_bit() -> None:
    mine, theirs = new_groups(), new_groups()
    optimizers = [
        RMSprop(mine, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8),
        torch.optim.RMSprop(theirs, lr=0.0),
    ]
    start = [p.detach().clone() for p in parameters(mine)]
    for step in range(20):
        for groups, optimizer in zip((mine, theirs), optimizers, strict=True):
            set_gradients(groups, step)
            optimizer.step()
    pairs = zip(parameters(mine), parameters(theirs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in zip(parameters(mine), start, strict=True))


def test_twenty_steps_equal_torchs_fused_adamw_bit_for_bit() -> None:
    mine, theirs = new_groups(), new_groups()
    optimizers = [ours(mine), torch.optim.AdamW(theirs, fused=True, **SETTINGS)]
    start = [p.detach().clone() for p in parameters(mine)]
    for step in range(20):
        for optimizer, groups in zip(optimizers, (mine, theirs), strict=True):
            set_gradients(groups, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
    for mine_p, theirs_p, start_p in zip(parameters(mine), parameters(theirs), start, strict=True):
        assert torch.equal(mine_p, theirs_p)
        assert not torch.equal(mine_p, start_p)


def test_steps_are_the_papers_algorithm() -> None:
    groups = new_groups(torch.float64)
    optimizer = ours(groups)
    expected = [p.detach().clone() for p in parameters(groups)]
    first = [torch.zeros_like(p) for p in expected]
    second = [torch.zeros_like(p) for p in expected]
    owners = [group for group in groups for _ in group["params"]]
    for step in range(1, 6):
        set_gradients(groups, step)
        for i, (p, owner) in enumerate(zip(parameters(groups), owners, strict=True)):
            assert p.grad is not None
            first[i] = 0.9 * first[i] + 0.1 * p.grad
            second[i] = 0.95 * second[i] + 0.05 * p.grad**2
            root = (second[i] / (1 - 0.95**step)).sqrt()
            update = first[i] / (1 - 0.9**step) / (root + 1e-8)
            expected[i] -= owner["lr"] * (update + owner["weight_decay"] * expected[i])
        optimizer.step()
    for p, wanted in zip(parameters(groups), expected, strict=True):
        # fp64, five steps of a dozen operations on numbers of order one.
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_step_count_lives_in_the_group_and_moments_alone_in_the_parameter() -> None:
    groups = new_groups()
    optimizer = ours(groups)
    optimizer.initialize_moments()
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    for step in range(3):
        set_gradients(groups, step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for p in parameters(groups):
        assert optimizer.state[p].keys() == {"exp_avg", "exp_avg_sq"}


def test_state_dict_goes_on_bit_for_bit() -> None:
    """A fresh step count would change the bias correction, and with it the fourth step."""
    whole, stopped, resumed = new_groups(), new_groups(), new_groups()
    optimizers = {"whole": ours(whole), "stopped": ours(stopped)}
    for step in range(3):
        for name, groups in (("whole", whole), ("stopped", stopped)):
            set_gradients(groups, step)
            optimizers[name].step()
    later = ours(resumed)
    later.load_state_dict(optimizers["stopped"].state_dict())
    with torch.no_grad():
        for target, source in zip(parameters(resumed), parameters(stopped), strict=True):
            target.copy_(source)
    for groups, optimizer in ((whole, optimizers["whole"]), (resumed, later)):
        set_gradients(groups, 3)
        optimizer.step()
    for p, expected in zip(parameters(resumed), parameters(whole), strict=True):
        assert torch.equal(p, expected)


def test_parameter_without_a_gradient_stays_where_it_is() -> None:
    groups = new_groups()
    optimizer = ours(groups)
    set_gradients(groups, 0)
    still = parameters(groups)[0]
    still.grad, before = None, still.detach().clone()
    optimizer.step()
    assert torch.equal(still, before)
    assert optimizer.param_groups[0]["step"] == 1


def test_what_it_does_not_offer_is_refused() -> None:
    message = "adam_w_mode is False; only decoupled weight decay is offered"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdamW(new_groups(), lr=0.0, weight_decay=0.0, adam_w_mode=False, **SETTINGS)
    message = "a closure was passed to AdamW.step; it is not supported"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ours(new_groups()).step(lambda: 0.0)


@pytest.fixture
def cfg() -> PretrainConfig:
    return parse_recipe(flags(device="cpu", num_layers=1), prog="test", description="")


@pytest.fixture
def built(
    cfg: PretrainConfig, request: pytest.FixtureRequest
) -> Iterator[tuple[torch.nn.Module, ChainedOptimizer]]:
    """A real model and its optimizer, under the rule and the optimizer that the test names."""
    rule, distributed = request.param
    optimizer_cfg = dataclasses.replace(cfg.optimizer, weight_decay_on=rule)
    parallel = dataclasses.replace(cfg.parallel, use_distributed_optimizer=distributed)
    cfg = dataclasses.replace(cfg, optimizer=optimizer_cfg, parallel=parallel)
    ctx = initialize(cfg)
    try:
        chunks = build_chunks(cfg, ctx, seed=1)
        wrapped = wrap_model(cfg, list(chunks.chunks), chunks.config)
        optimizer = build_optimizer(
            cfg.optimizer,
            list(wrapped),
            bf16=False,
            use_distributed_optimizer=distributed,
        )
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        yield unwrap(wrapped[0]), optimizer
    finally:
        shut_down()


def decayed(model: torch.nn.Module, optimizer: ChainedOptimizer) -> dict[str, bool]:
    """Take a step without gradients, and see what shrank by exactly lr * weight decay."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_schedule(optimizer, lr=0.5, weight_decay=0.25)
    updated, grad_norm, _ = optimizer.step()
    assert updated
    assert grad_norm == 0.0
    found = {}
    for name, p in model.named_parameters():
        shrunk = before[name] * (1 - 0.5 * 0.25)
        # One rounding of fp32, 6e-8.
        is_decayed = torch.allclose(p, shrunk, rtol=2e-7, atol=0)
        assert is_decayed != torch.equal(p, before[name]), name
        found[name] = is_decayed
    return found


# megatron-core 0.16 gathers the distributed optimizer's parameters under torch's former name.
@pytest.mark.filterwarnings("ignore:.torch.distributed.all_gather_into_tensor. is deprecated")
@pytest.mark.parametrize(
    ("built", "rule"),
    [((rule, dist), rule) for rule in ("all", "matrices") for dist in (False, True)],
    indirect=["built"],
    ids=["all", "all-distributed", "matrices", "matrices-distributed"],
)
def test_weight_decay_reaches_what_the_rule_says(
    built: tuple[torch.nn.Module, ChainedOptimizer], rule: Rule
) -> None:
    found = decayed(*built)
    kinds = ("q_norm", "k_norm", "layernorm", "word_embeddings", "router", "weight1", "weight2")
    for kind in (*kinds, "linear_qkv", "linear_proj", "output_layer"):
        assert any(kind in name for name in found), kind
    norms = {name for name in found if "norm" in name}
    assert len(norms) == 5
    spared = {name for name, is_decayed in found.items() if not is_decayed}
    assert spared == (set() if rule == "all" else norms)


@pytest.mark.parametrize("built", [("matrices", False)], indirect=True)
def test_groups_are_described_with_their_sizes(
    built: tuple[torch.nn.Module, ChainedOptimizer],
) -> None:
    model, optimizer = built
    sizes: dict[tuple[str, str], list[int]] = {}
    for name, p in model.named_parameters():
        kind = "expert" if ".experts." in name else "dense"
        sizes.setdefault((kind, "0.3" if p.dim() > 1 else "0"), []).append(p.numel())
    expected = {
        f"{kind}: {len(found)} tensors, {sum(found):,} values on this rank, weight decay {decay}"
        for (kind, decay), found in sizes.items()
    }
    assert len(expected) == 3
    assert set(describe_groups(optimizer, 0.3)) == expected


def test_defaults_are_olmoes() -> None:
    cfg = OptimizerConfig()
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps) == (0.9, 0.95, 1e-8)
    assert (cfg.weight_decay, cfg.weight_decay_on, cfg.clip_grad) == (0.1, "all", 1.0)
