"""Routers against a gate, a selection and losses written out in plain Python, with gradients."""

import re
from collections.abc import Callable
from functools import partial
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
from moe_ext.routers import (
    ROUTERS,
    MoERouter,
    Routing,
    SoftmaxTopKRouter,
    TopKSoftmaxRouter,
    get_router,
    register_router,
)

ConfigMaker = Callable[..., TransformerConfig]
RouterMaker = Callable[..., MoERouter]

ALPHA, BETA, SCALE = 0.3, 0.07, 0.25
SEQUENCE, BATCH, WIDTH, EXPERTS, TOPK = 5, 2, 8, 4, 2
TOKENS = SEQUENCE * BATCH


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline schedule would set before backward."""
    scale = torch.tensor(SCALE, dtype=torch.float64)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)


@pytest.fixture
def build(single_rank: ProcessGroupCollection, make_config: ConfigMaker) -> RouterMaker:
    def router(kind: type[MoERouter], **changes: Any) -> MoERouter:
        arguments = {
            "aux_loss_coeff": ALPHA,
            "z_loss_coeff": BETA,
            "router_dtype": None,
            "metrics": RouterMetrics(2, EXPERTS),
        }
        config = make_config(**changes.pop("config", {}))
        torch.manual_seed(0)
        built = kind(config=config, pg_collection=single_rank, **{**arguments, **changes})
        with torch.no_grad():
            built.weight.normal_()
        built.set_layer_number(2)
        return built

    return router


def random_hidden() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (SEQUENCE, BATCH, WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def written_out(
    kind: type[MoERouter], hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """probs [t, e], load-balancing loss, z-loss, one token and one expert at a time."""
    tokens = [hidden[s, b] for s in range(SEQUENCE) for b in range(BATCH)]
    counts, rows = [0] * EXPERTS, []
    z_loss = torch.zeros((), dtype=torch.float64)
    mass = list(torch.zeros(EXPERTS, dtype=torch.float64))
    for token in tokens:
        exps = [(token @ weight[e]).exp() for e in range(EXPERTS)]
        total = torch.stack(exps).sum()
        chosen = sorted(range(EXPERTS), key=lambda e: -exps[e].item())[:TOPK]
        divisor = (
            torch.stack([exps[e] for e in chosen]).sum() if kind is TopKSoftmaxRouter else total
        )
        rows.append(torch.stack([exps[e] / divisor * float(e in chosen) for e in range(EXPERTS)]))
        for e in range(EXPERTS):
            counts[e] += e in chosen
            mass[e] = mass[e] + exps[e] / total
        z_loss = z_loss + total.log() ** 2
    shares = [n / (TOKENS * TOPK) * m / TOKENS for n, m in zip(counts, mass, strict=True)]
    balance = EXPERTS * torch.stack(shares).sum()
    return torch.stack(rows), balance, z_loss / TOKENS, counts


@pytest.mark.parametrize("kind", [SoftmaxTopKRouter, TopKSoftmaxRouter])
def test_probs_losses_and_gradients_equal_the_written_out_router(
    build: RouterMaker, kind: type[MoERouter]
) -> None:
    router, hidden = build(kind), random_hidden()
    routing = router(hidden)
    probs = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, *routing[:2])
    expected, balance, z_loss, counts = written_out(kind, hidden, router.weight)
    torch.testing.assert_close(probs, expected, rtol=1e-12, atol=1e-12)
    assert [row.nonzero().flatten().tolist() for row in expected] == routing.experts.tolist()
    # Backward through probs adds both losses' gradients at the schedule's scale.
    upstream = torch.linspace(-1, 1, probs.numel(), dtype=torch.float64).view_as(probs)
    inputs = [hidden, router.weight]
    objective = (expected * upstream).sum() + SCALE * (ALPHA * balance + BETA * z_loss)
    for grad, truth in zip(
        torch.autograd.grad(probs, inputs, upstream),
        torch.autograd.grad(objective, inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-12)
    report = router.metrics.reduce()
    assert report.load_balancing_loss == pytest.approx(balance.item(), rel=1e-12)
    assert report.z_loss == pytest.approx(z_loss.item(), rel=1e-12)
    assert report.load[1].tolist() == pytest.approx([n * EXPERTS / TOKENS / TOPK for n in counts])


def test_bf16_gates_in_bf16_unless_fp32_is_asked_for(build: RouterMaker) -> None:
    hidden = random_hidden().detach().bfloat16()
    router = build(SoftmaxTopKRouter).bfloat16()
    narrow = router.gating(hidden)
    assert narrow.dtype == torch.bfloat16
    router.router_dtype = torch.float32
    wide = router.gating(hidden)
    expected = hidden.view(-1, WIDTH).double() @ router.weight.double().T
    assert wide.dtype == torch.float32
    # fp32 products of eight terms of order one; the bf16 gate misses this by three digits.
    torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)
    assert (narrow.double() - expected).abs().max() > 1e-3
    assert router(hidden).gates.dtype == torch.float32


@pytest.mark.parametrize("mode", ["evaluation", "no_grad"])
def test_without_training_gradients_there_is_no_loss_and_no_record(
    build: RouterMaker, mode: str
) -> None:
    router, hidden = build(SoftmaxTopKRouter), random_hidden()
    if mode == "evaluation":
        router.eval()
        grad = torch.autograd.grad(router(hidden).gates.sum(), router.weight)[0]
        expected, *_ = written_out(SoftmaxTopKRouter, hidden, router.weight)
        truth = torch.autograd.grad(expected.sum(), router.weight)[0]
        torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-12)
    else:
        with torch.no_grad():
            router(hidden)
    assert router.metrics.reduce().as_dict() == {}


@pytest.mark.parametrize(
    ("name", "shape"), [("experts", (TOKENS, 3)), ("gates", (TOKENS, EXPERTS)), ("scores", (2, 2))]
)
def test_a_selection_of_another_shape_is_refused(
    build: RouterMaker, name: str, shape: tuple[int, ...]
) -> None:
    class OwnRouter(SoftmaxTopKRouter):
        def select(self, logits: Tensor) -> Routing:
            return super().select(logits)._replace(**{name: torch.zeros(shape)})

    wanted = {"scores": [TOKENS, EXPERTS]}.get(name, [TOKENS, TOPK])
    message = f"OwnRouter.select returned {name} {list(shape)}, but they must be {wanted}"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(OwnRouter)(random_hidden())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_experts_of_another_dtype_are_refused(build: RouterMaker, dtype: torch.dtype) -> None:
    class OwnRouter(SoftmaxTopKRouter):
        def select(self, logits: Tensor) -> Routing:
            routing = super().select(logits)
            return routing._replace(experts=routing.experts.to(dtype))

    message = f"OwnRouter.select returned experts of {dtype}, but they are indices of torch.int64"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(OwnRouter)(random_hidden())


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_experts_that_are_not_there_are_refused(build: RouterMaker, expert: int) -> None:
    class OwnRouter(SoftmaxTopKRouter):
        def select(self, logits: Tensor) -> Routing:
            routing = super().select(logits)
            routing.experts[1, 0] = expert
            return routing

    message = f"OwnRouter.select returned expert {expert}; experts are counted from 0, so indices"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(OwnRouter)(random_hidden())


def test_nothing_but_the_weight_is_saved(build: RouterMaker) -> None:
    router = build(SoftmaxTopKRouter)
    router(random_hidden())
    assert list(router.state_dict()) == ["weight"]
    shards = router.sharded_state_dict("router.", ((0, 1, 3),))
    assert list(shards) == ["router.weight"]
    assert shards["router.weight"].global_shape == (3, EXPERTS, WIDTH)
    assert shards["router.weight"].replica_id == (0, 0, 0)


def test_the_weight_is_marked_for_the_sum_over_tensor_parallel_ranks(build: RouterMaker) -> None:
    config = {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    split: Any = build(SoftmaxTopKRouter, config=config).weight
    whole: Any = build(SoftmaxTopKRouter).weight
    assert split.sequence_parallel is True
    assert whole.sequence_parallel is False


def test_it_builds_on_the_meta_device(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    with torch.device("meta"):
        router = SoftmaxTopKRouter(
            make_config(),
            single_rank,
            aux_loss_coeff=0.0,
            z_loss_coeff=0.0,
            router_dtype=None,
            metrics=RouterMetrics(1, EXPERTS),
        )
    assert router.weight.is_meta


def test_a_padding_mask_of_other_tokens_is_refused(build: RouterMaker) -> None:
    message = "the padding_mask is [2, 5], but must be [5, 2]: [s, b] of this rank's tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(SoftmaxTopKRouter)(random_hidden(), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("kind", [SoftmaxTopKRouter, TopKSoftmaxRouter])
def test_losses_and_counts_of_padded_rows_are_those_of_their_tokens(
    build: RouterMaker, kind: type[MoERouter]
) -> None:
    hidden, padding = random_hidden(), torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    padding[3:, 0] = padding[1:, 1] = True
    padded, alone = build(kind), build(kind)
    tokens = hidden[~padding][:, None]  # [4, 1, h]
    routing, truth = padded(hidden, padding), alone(tokens)
    assert torch.equal(routing.experts[~padding.flatten()], truth.experts)
    # The losses' gradients alone: nothing comes from the gates.
    routing.gates.backward(torch.zeros_like(routing.gates))
    gradient, hidden.grad = hidden.grad, None
    truth.gates.backward(torch.zeros_like(truth.gates))
    assert gradient is not None and not gradient[padding].any()
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(padded.weight.grad, alone.weight.grad, rtol=1e-12, atol=1e-15)
    found, expected = padded.metrics.reduce(), alone.metrics.reduce()
    assert found.as_dict() == pytest.approx(expected.as_dict(), rel=1e-12)
    assert torch.equal(found.load[1], expected.load[1])


def test_padding_alone_has_no_losses(build: RouterMaker) -> None:
    router, hidden = build(SoftmaxTopKRouter), random_hidden()
    gates = router(hidden, torch.ones(SEQUENCE, BATCH, dtype=torch.bool)).gates
    gates.backward(torch.zeros_like(gates))
    assert hidden.grad is not None and not hidden.grad.any()


def test_per_token_loss_is_refused(build: RouterMaker) -> None:
    message = (
        "calculate_per_token_loss is True, but the routers scale their losses per micro-batch; "
        "set it to False"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build(SoftmaxTopKRouter, config={"calculate_per_token_loss": True})


def test_a_router_without_a_layer_number_says_so(build: RouterMaker) -> None:
    router = build(SoftmaxTopKRouter)
    router.layer_number = None
    message = "the router has no layer number; call set_layer_number first"
    with pytest.raises(ValueError, match=re.escape(message)):
        router(random_hidden())


def test_an_unknown_router_is_refused_with_the_nearest_name() -> None:
    message = (
        "unknown router 'softmax_topK'; known: expert_choice, expert_choice_grouped, softmax_topk,"
        " topk_softmax; "
        "did you mean 'softmax_topk'?"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        get_router("softmax_topK")


def test_a_registered_router_is_found_never_replaced_and_must_be_a_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_ext.routers.ROUTERS", dict(ROUTERS))

    class OwnRouter(SoftmaxTopKRouter):
        pass

    register_router("own", OwnRouter)
    assert get_router("own") is OwnRouter
    with pytest.raises(ValueError, match=re.escape("router 'own' is already registered as")):
        register_router("own", SoftmaxTopKRouter)
    message = "router 'dict' is <class 'dict'>; derive a class from moe_ext.routers.MoERouter"
    with pytest.raises(ValueError, match=re.escape(message)):
        register_router("dict", dict)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("is_local", [False, True])
def test_a_layer_of_experts_equals_a_sum_over_experts(
    single_rank: ProcessGroupCollection,
    make_config: ConfigMaker,
    build: RouterMaker,
    dispatcher: str,
    backend: str,
    is_local: bool,
) -> None:
    config = make_config(moe_token_dispatcher_type=dispatcher, init_method_std=0.5)
    metrics = RouterMetrics(2, EXPERTS)
    layer = ExpertsLayer(
        config,
        MoESubmodules(
            experts=ModuleSpec(module=ExpertMLP, params={"backend": look_up_backend(backend)}),
            router=partial(
                SoftmaxTopKRouter,
                aux_loss_coeff=0.0,
                z_loss_coeff=0.0,
                router_dtype=None,
                metrics=metrics,
            ),
        ),
        pg_collection=single_rank,
    )
    layer.is_local = is_local  # or megatron-core's dispatcher
    layer.set_layer_number(1)
    hidden = random_hidden()
    output, _ = layer(hidden)
    probs, *_ = written_out(SoftmaxTopKRouter, hidden, layer.router.weight)
    flat, expected = hidden.view(TOKENS, WIDTH), torch.zeros((), dtype=torch.float64)
    for e in range(EXPERTS):
        gate, up = layer.experts.weight1[e]
        middle = torch.nn.functional.silu(flat @ gate.T) * (flat @ up.T)
        expected = expected + probs[:, e : e + 1] * (middle @ layer.experts.weight2[e].T)
    expected = expected.view_as(hidden)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    inputs = [hidden, *layer.parameters()]
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    for grad, truth in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12)
