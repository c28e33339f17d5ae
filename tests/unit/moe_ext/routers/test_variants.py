"""Variants of routing and balancing against plain loops over tokens, with gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.experts import ExpertMLP, look_up_backend
from moe_ext.experts.layer import ExpertsLayer
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import ROUTERS, MoERouter
from moe_ext.routers.balancing import Balancing
from moe_ext.routers.updates import RouterUpdates

ALPHA, BETA, SCALE = 0.3, 0.07, 0.25
S, B, WIDTH, E, K, FFN = 6, 2, 8, 4, 2, 6
PADDING = torch.tensor([[False] * S, [False] * 3 + [True] * 3])  # [b, s]
NO_PADDING = torch.zeros(B, S, dtype=torch.bool)
BIAS = (0.3, -0.2, 0.0, 0.05)

Build = Callable[..., ExpertsLayer]


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline schedule would set before backward."""
    scale = torch.tensor(SCALE, dtype=torch.float64)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)


@pytest.fixture
def build(
    single_rank: ProcessGroupCollection, make_config: Callable[..., TransformerConfig]
) -> Build:
    """Builds a layer of experts behind a router of a name."""

    def layer(name: str, **balancing: Any) -> ExpertsLayer:
        def router(**given: Any) -> MoERouter:
            given.pop("layer_number", None)
            return ROUTERS[name](
                aux_loss_coeff=0.0 if name.startswith("expert_choice") else ALPHA,
                z_loss_coeff=BETA,
                router_dtype=None,
                metrics=RouterMetrics(1, E, is_varying=True),
                balancing=Balancing(**balancing),
                **given,
            )

        torch.manual_seed(0)
        config = make_config(moe_ffn_hidden_size=FFN, moe_router_topk=K)
        experts = ModuleSpec(module=ExpertMLP, params={"backend": look_up_backend("grouped")})
        submodules = MoESubmodules(experts=experts, router=router)
        built = ExpertsLayer(config, submodules, pg_collection=single_rank)
        built.set_layer_number(1)
        with torch.no_grad():
            for weight in built.parameters():
                weight.normal_()
            if built.router.expert_bias is not None:
                built.router.expert_bias.copy_(torch.tensor(BIAS))
        return built

    return layer


def random_hidden(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((S, B, WIDTH), generator=generator, dtype=torch.float64).requires_grad_()


class Loop:
    """A micro-batch, one token at a time: scores, choices by token and losses."""

    def __init__(self, layer: ExpertsLayer, hidden: Tensor, padding: Tensor) -> None:
        self.layer, self.hidden = layer, hidden
        self.tokens = [(s, b) for s in range(S) for b in range(B)]
        self.real = [(s, b) for s, b in self.tokens if not padding[b, s]]
        logits = {t: layer.router.weight @ hidden[t] for t in self.tokens}
        self.scores = {t: logits[t].exp() / logits[t].exp().sum() for t in self.tokens}
        self.z_loss = sum((logits[t].exp().sum().log() ** 2 for t in self.real), zero()) / len(
            self.real
        )

    def token_choice(self, bias: tuple[float, ...] = (0.0,) * E) -> dict[Any, list[int]]:
        return {
            t: sorted(range(E), key=lambda e: -(self.scores[t][e].item() + bias[e]))[:K]
            for t in self.tokens
        }

    def expert_choice(self, *, is_grouped: bool) -> dict[Any, list[int]]:
        groups = (
            [self.real] if is_grouped else [[t for t in self.real if t[1] == b] for b in (0, 1)]
        )
        chosen: dict[Any, list[int]] = {t: [] for t in self.tokens}
        for group in groups:
            for e in range(E):
                best = sorted(group, key=lambda t: -self.scores[t][e].item())
                for t in best[: max(1, len(group) * K // E)]:
                    chosen[t].append(e)
        return chosen

    def dropped(
        self, chosen: dict[Any, list[int]], factor: float, policy: str
    ) -> dict[Any, list[int]]:
        capacity = math.ceil(factor * len(self.real) * K / E)
        kept: dict[Any, list[int]] = {t: [] for t in self.tokens}
        for e in range(E):
            wanting = [t for t in self.real if e in chosen[t]]
            if policy == "probs":
                wanting.sort(key=lambda t: -self.scores[t][e].item())
            for t in wanting[:capacity]:
                kept[t].append(e)
        return kept

    def output(self, chosen: dict[Any, list[int]]) -> Tensor:
        experts = self.layer.experts
        rows = []
        for t in self.tokens:
            x, total = self.hidden[t], torch.zeros(WIDTH, dtype=torch.float64)
            for e in chosen[t]:
                gate, up = experts.weight1[e]
                silu = (gate @ x) * torch.sigmoid(gate @ x)
                total = total + self.scores[t][e] * (experts.weight2[e] @ (silu * (up @ x)))
            rows.append(total)
        return torch.stack(rows).view(S, B, WIDTH)

    def balance(self, group: list[Any], chosen: dict[Any, list[int]], shares: Any = None) -> Tensor:
        counts = [sum(e in chosen[t] for t in group) for e in range(E)]
        shares = shares or [n / (len(group) * K) for n in counts]
        means = [sum((self.scores[t][e] for t in group), zero()) / len(group) for e in range(E)]
        return E * sum((f * p for f, p in zip(shares, means, strict=True)), zero())


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def compare(
    layer: ExpertsLayer, hidden: Tensor, padding: Tensor, output: Tensor, losses: Tensor
) -> None:
    """Outputs of real tokens and all gradients of a training pass; it records once."""
    mask = None if not padding.any() else padding
    found, _ = layer(hidden, padding_mask=mask)
    real = ~padding.T  # [s, b]
    torch.testing.assert_close(found[real], output[real], rtol=1e-11, atol=1e-12)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    upstream = upstream * real[..., None]
    inputs = [hidden, *layer.parameters()]
    truths = torch.autograd.grad(
        (output * upstream).sum() + SCALE * losses, inputs, retain_graph=True
    )
    for grad, truth in zip(torch.autograd.grad(found, inputs, upstream), truths, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("padding", [NO_PADDING, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["expert_choice", "expert_choice_grouped"])
def test_experts_choose_tokens(build: Build, name: str, padding: Tensor) -> None:
    layer, hidden = build(name), random_hidden()
    loop = Loop(layer, hidden, padding)
    chosen = loop.expert_choice(is_grouped=name.endswith("grouped"))
    compare(layer, hidden, padding, loop.output(chosen), BETA * loop.z_loss)
    report = layer.router.metrics.reduce()
    lost = [t for t in loop.real if not chosen[t]]
    assert report.unrouted_share == pytest.approx(len(lost) / len(loop.real))
    assert report.as_dict()["moe_unrouted_share"] == report.unrouted_share
    assert report.z_loss == pytest.approx(loop.z_loss.item(), rel=1e-12)
    assert len({len(experts) for experts in chosen.values()}) > 1


@pytest.mark.parametrize("padding", [NO_PADDING, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_experts_drop_what_is_beyond_their_capacity(
    build: Build, policy: str, padding: Tensor
) -> None:
    layer = build("softmax_topk", capacity_factor=0.7, drop_policy=policy)
    hidden = random_hidden()
    loop = Loop(layer, hidden, padding)
    wanted = loop.token_choice()
    kept = loop.dropped(wanted, 0.7, policy)
    # The loss is of what was wanted: dropping does not hide an imbalance.
    losses = ALPHA * loop.balance(loop.real, wanted) + BETA * loop.z_loss
    compare(layer, hidden, padding, loop.output(kept), losses)
    lost = len(loop.real) * K - sum(len(each) for each in kept.values())
    report = layer.router.metrics.reduce()
    assert 0 < lost and report.dropped_share == pytest.approx(lost / (len(loop.real) * K))
    layer.eval()
    dropless = loop.output(wanted)
    torch.testing.assert_close(layer(hidden)[0], dropless, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padding", [NO_PADDING, PADDING], ids=["whole", "padded"])
def test_sequences_are_balanced_alone(build: Build, padding: Tensor) -> None:
    layer, hidden = build("softmax_topk", loss="seq_aux_loss"), random_hidden()
    loop = Loop(layer, hidden, padding)
    chosen = loop.token_choice()
    each = [loop.balance([t for t in loop.real if t[1] == b], chosen) for b in range(B)]
    balance = (each[0] + each[1]) / 2
    assert abs(balance - loop.balance(loop.real, chosen)) > 1e-3
    losses = ALPHA * balance + BETA * loop.z_loss
    compare(layer, hidden, padding, loop.output(chosen), losses)
    report = layer.router.metrics.reduce()
    assert report.load_balancing_loss == pytest.approx(balance.item(), rel=1e-12)


def test_shares_are_counted_over_the_step_so_far(build: Build) -> None:
    layer = build("softmax_topk", loss="global_aux_loss")
    updates = RouterUpdates([layer])
    for _ in range(2):  # a step forgets the one before
        updates.begin()
        counts = [0] * E
        for seed, padding in ((1, NO_PADDING), (2, PADDING)):
            hidden = random_hidden(seed)
            loop = Loop(layer, hidden, padding)
            chosen = loop.token_choice()
            for e in range(E):
                counts[e] += sum(e in chosen[t] for t in loop.real)
            shares = [n / sum(counts) for n in counts]
            balance = loop.balance(loop.real, chosen, shares)
            if seed == 2:
                assert abs(balance - loop.balance(loop.real, chosen)) > 1e-3
            losses = ALPHA * balance + BETA * loop.z_loss
            compare(layer, hidden, padding, loop.output(chosen), losses)


def test_layers_that_share_a_router_are_counted_apart(build: Build) -> None:
    layer = build("softmax_topk", loss="global_aux_loss")
    layer.router.metrics = RouterMetrics(2, E, is_varying=True)
    for number in (2, 1):  # as they are recomputed
        layer.set_layer_number(number)
        loop = Loop(layer, hidden := random_hidden(number), NO_PADDING)
        chosen = loop.token_choice()
        losses = ALPHA * loop.balance(loop.real, chosen) + BETA * loop.z_loss
        compare(layer, hidden, NO_PADDING, loop.output(chosen), losses)


def test_a_bias_selects_and_does_not_weigh(build: Build) -> None:
    layer, hidden = build("softmax_topk", has_bias=True), random_hidden()
    loop = Loop(layer, hidden, NO_PADDING)
    chosen = loop.token_choice(BIAS)
    assert chosen != loop.token_choice()
    losses = ALPHA * loop.balance(loop.real, chosen) + BETA * loop.z_loss
    compare(layer, hidden, NO_PADDING, loop.output(chosen), losses)


def test_a_bias_selects_experts_whose_gates_are_their_softmax(build: Build) -> None:
    router = build("topk_softmax", has_bias=True).router
    hidden = random_hidden()
    routing = router(hidden)
    logits = router.gating(hidden)
    scores = logits.softmax(dim=-1) + torch.tensor(BIAS)
    for t in range(S * B):
        chosen = sorted(scores[t].argsort(descending=True)[:K].tolist())
        assert routing.experts[t].tolist() == chosen
        truth = logits[t][chosen].softmax(dim=0)
        torch.testing.assert_close(routing.gates[t], truth, rtol=1e-12, atol=1e-12)


def test_a_bias_moves_toward_the_mean_load_after_a_step(build: Build) -> None:
    layer = build("softmax_topk", has_bias=True, bias_rate=0.25)
    updates = RouterUpdates([layer])
    counts = [0] * E
    updates.begin()
    for seed, padding in ((1, NO_PADDING), (2, PADDING)):
        hidden = random_hidden(seed)
        chosen = (loop := Loop(layer, hidden, padding)).token_choice(BIAS)
        layer(hidden, padding_mask=padding)
        for e in range(E):
            counts[e] += sum(e in chosen[t] for t in loop.real)
    with torch.no_grad():
        layer(random_hidden(3))  # no part of the step: the first pass of a recomputed layer
    assert layer.router.expert_bias.tolist() == torch.tensor(BIAS).tolist()
    updates.finish()
    mean = sum(counts) / E
    assert min(counts) < mean < max(counts)
    moved = [b + 0.25 * ((n < mean) - (n > mean)) for b, n in zip(BIAS, counts, strict=True)]
    assert layer.router.expert_bias.tolist() == pytest.approx(moved)
    updates.begin()  # a refused step: it is not finished, and leaves nothing behind
    layer(random_hidden(3))
    updates.begin()
    updates.finish()
    assert layer.router.expert_bias.tolist() == pytest.approx(moved)


def test_a_bias_is_saved_and_stays_in_fp32(build: Build) -> None:
    router = build("softmax_topk", has_bias=True).router
    with torch.no_grad():
        router.expert_bias.fill_(1.001)  # no bf16 number
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert router.expert_bias[0].item() == pytest.approx(1.001, rel=1e-7)
    shard = router.sharded_state_dict("router.", ((0, 1, 3),))["router.expert_bias"]
    assert shard.global_shape == (3, E) and shard.dtype == torch.float32


def test_a_frozen_router_keeps_its_bias(build: Build) -> None:
    layer = build("softmax_topk", has_bias=True)
    layer.router.weight.requires_grad_(False)
    updates = RouterUpdates([layer])
    updates.begin()
    layer(random_hidden())
    updates.finish()
    assert layer.router.expert_bias.tolist() == torch.tensor(BIAS).tolist()


def test_a_router_that_does_not_add_it_refuses_a_bias(build: Build) -> None:
    message = "ExpertChoiceRouter selects without a bias"
    with pytest.raises(ValueError, match=message):
        build("expert_choice", has_bias=True)
