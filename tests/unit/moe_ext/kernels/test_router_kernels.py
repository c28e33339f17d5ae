"""The router's kernels against float64, alone and in a router; interpreted, or on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext import functional
from moe_ext.experts.slots import sort_by_expert
from moe_ext.kernels import expert_order, fused, router_choice, router_losses, triton_jit
from moe_ext.kernels.expert_order import count_and_sort
from moe_ext.kernels.router_choice import RouterRule, select
from moe_ext.kernels.router_losses import differentiable
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import MoERouter, Routing, SoftmaxTopKRouter, TopKSoftmaxRouter
from moe_ext.routers.balancing import Balancing

pytest.importorskip("triton", reason="triton has no wheel for this platform")

DEVICE = "cpu" if triton_jit.IS_INTERPRETED else "cuda"
RULES: tuple[RouterRule, ...] = ("softmax_topk", "topk_softmax")
# Sums of at most 40 numbers below ten, in fp32.
LIMIT = 2e-6
# A gradient in bf16 is rounded once; the interpreter cuts off.
LIMITS = {torch.float32: LIMIT, torch.bfloat16: 2.0**-7}
ALPHA, BETA, SCALE = 0.3, 0.07, 0.25


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows a block, several blocks a part, and several parts."""
    monkeypatch.setattr(router_choice, "_TILE", 32)
    monkeypatch.setattr(router_choice, "PARTS", 3)
    monkeypatch.setattr(expert_order, "_TILE", 32)
    monkeypatch.setattr(expert_order, "PARTS", 3)


def random_logits(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)) * 2
    return logits.to(DEVICE, dtype).requires_grad_()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def distance(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double(), exact.detach()
    return float((actual - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("sizes", "has_bias", "dtype"),
    [
        ((29, 12, 3), False, torch.float32),
        ((29, 12, 3), True, torch.bfloat16),
        ((3, 16, 16), False, torch.bfloat16),
        ((5, 1, 1), True, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_selection_and_gradients_are_those_of_float64(
    rule: RouterRule, sizes: tuple[int, int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    tokens, number, topk = sizes
    logits = random_logits(tokens, number, dtype)
    bias = random(number, seed=3) * 0.1 if has_bias else None
    found = select(logits.detach(), rule, topk, bias=bias)
    exact = logits.detach().double().requires_grad_()
    truth = functional.sort_choices(
        getattr(functional, rule)(exact, topk, None if bias is None else bias.double())
    )
    assert torch.equal(found.experts, truth.experts)
    gates, scores, addend = differentiable(logits, found, None, rule)
    assert addend is None and found.sums is None
    for a, b in ((gates, truth.gates), (scores, truth.scores)):
        assert a.dtype == torch.float32 and distance(a, b) <= LIMIT
    for upstream in ((random(tokens, topk, seed=1), random(tokens, number, seed=2)), None):
        outputs = (gates, scores) if upstream else gates.square().sum()
        (gradient,) = torch.autograd.grad(outputs, logits, upstream, retain_graph=True)
        expected = (truth.gates, truth.scores) if upstream else truth.gates.square().sum()
        wide = upstream and tuple(each.double() for each in upstream)
        (true_gradient,) = torch.autograd.grad(expected, exact, wide, retain_graph=True)
        assert gradient.dtype == dtype
        # Of one expert the gradient is 0, but for roundings.
        assert (gradient.double() - true_gradient).norm() <= LIMITS[dtype] * (
            true_gradient.norm() + 1
        )


def test_of_equal_keys_the_first_are_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 5, [-torch.inf] * 4 + [0.0]])
    for rule in RULES:
        experts = select(logits.to(DEVICE), rule, 3).experts
        assert experts.tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 4]]
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0], device=DEVICE)
    experts = select(torch.zeros(1, 5, device=DEVICE), "softmax_topk", 2, bias=bias).experts
    assert experts.tolist() == [[0, 4]]


# numpy, which is the interpreter's arithmetic, warns of these.
@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")
def test_what_is_no_number_is_seen_and_its_experts_exist() -> None:
    logits = random_logits(6, 5).detach().clone()
    logits[1], logits[3, 2], logits[4, 0] = torch.nan, torch.nan, torch.inf
    for rule in RULES:
        found = select(logits, rule, 3, with_sums=True)
        distinct = [sorted(set(row)) for row in found.experts.tolist()]
        assert distinct == found.experts.tolist() and found.experts.max() < 5
        assert found.scores.isnan().any(dim=1).tolist() == [False, True, False, True, True, False]
        assert found.sums is not None and found.sums.losses.isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="6 of 5 experts; give 1 to all of them, of at most 1024"):
        select(torch.zeros(2, 5), "softmax_topk", 6)
    with pytest.raises(ValueError, match=r"bias is \(4,\) for logits \[2, 5\]"):
        select(torch.zeros(2, 5), "softmax_topk", 1, bias=torch.zeros(4))
    message = r"experts are \(2, 1\) of torch.int64, 3 in all; give \[n\]"
    with pytest.raises(ValueError, match=message):
        count_and_sort(torch.zeros(2, 1, dtype=torch.int64), 3)


@pytest.mark.parametrize(("number", "experts"), [(0, 3), (1, 1), (77, 5), (64, 16), (7, 40)])
def test_the_order_is_that_of_a_stable_sort(number: int, experts: int) -> None:
    # Some experts have none; within a token one may be twice.
    drawn = torch.randint(
        max(1, experts - 1), (number,), generator=torch.Generator().manual_seed(4)
    )
    rows, places, counts = count_and_sort(drawn.to(DEVICE), experts)
    expected = drawn.argsort(stable=True)
    assert rows.tolist() == expected.tolist()
    assert places[rows].tolist() == list(range(number))
    assert counts.tolist() == drawn.bincount(minlength=experts).tolist()
    assert rows.dtype == places.dtype == counts.dtype == torch.int64


Build = Callable[..., MoERouter]
S, B, E, K = 11, 2, 6, 2


@pytest.fixture
def build(
    single_rank: ProcessGroupCollection,
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Build:
    """Build a router in fp32 that takes kernels, or in float64 that does not."""
    monkeypatch.setattr(fused, "takes", lambda setting, x: x.dtype == torch.float32)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(SCALE))

    def router(kind: type[MoERouter], dtype: torch.dtype, **balancing: Any) -> MoERouter:
        config = make_config(params_dtype=dtype, moe_router_topk=K, num_moe_experts=E)
        built = kind(
            config=config,
            pg_collection=single_rank,
            aux_loss_coeff=ALPHA,
            z_loss_coeff=BETA,
            router_dtype=None,
            metrics=RouterMetrics(1, E),
            balancing=Balancing(**balancing),
        ).to(DEVICE)
        built.set_layer_number(1)
        with torch.no_grad():
            built.weight.copy_(random(E, 8, seed=5))
            if built.expert_bias is not None:
                built.expert_bias.copy_(random(E, seed=6) * 0.1)
        return built

    return router


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note the routings in kernels."""
    found: list[int] = []
    function = MoERouter.route_in_kernels

    def noted(*args: Any) -> Routing:
        found.append(1)
        return function(*args)

    monkeypatch.setattr(MoERouter, "route_in_kernels", noted)
    yield found


@pytest.mark.parametrize(
    ("kind", "balancing", "is_padded", "num_ranks"),
    [
        (SoftmaxTopKRouter, {}, False, 1),
        (TopKSoftmaxRouter, {}, True, 1),
        (SoftmaxTopKRouter, {}, True, 2),
        (TopKSoftmaxRouter, {"has_bias": True}, False, 2),
        (SoftmaxTopKRouter, {"has_bias": True}, True, 1),
        (SoftmaxTopKRouter, {"loss": "global_aux_loss"}, True, 2),
    ],
    ids=str,
)
def test_a_router_in_kernels_is_the_one_in_torch(
    build: Build,
    launched: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[MoERouter],
    balancing: dict[str, Any],
    is_padded: bool,
    num_ranks: int,
) -> None:
    # The other rank has what this one has, each expert's neighbour's.
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.add_(x.roll(1)))
    padding = torch.zeros(S, B, dtype=torch.bool, device=DEVICE)
    padding[7:, 1] = is_padded
    hidden = random(S, B, 8, seed=7)
    results = []
    for dtype in (torch.float32, torch.float64):
        router = build(kind, dtype, **balancing)
        router.token_group = type("Group", (), {"size": lambda self: num_ranks})()
        steps: list[Tensor] = []
        for factor in (1.0, -0.5):  # two micro-batches of a step
            x = (factor * hidden.to(dtype)).requires_grad_()
            routing = router(x, padding if is_padded else None)
            upstream = random(S * B, K, seed=8).to(dtype)
            steps += torch.autograd.grad(routing.gates, [x, router.weight], upstream)
            steps += [routing.experts, routing.gates.detach()]
        report = router.metrics.reduce()
        results.append((steps, report, router.step.local))
    assert len(launched) == 2
    (steps, report, counted), (exact, expected, truly) = results
    for a, b in zip(steps, exact, strict=True):
        assert distance(a, b.double()) <= LIMIT, (a, b)
    # Printed sums of a few fp32 numbers.
    assert report.as_dict() == pytest.approx(expected.as_dict(), rel=1e-5)
    assert torch.equal(report.load, expected.load)
    assert (counted is None) == (truly is None) == ("has_bias" not in balancing)
    if counted is not None and truly is not None:
        assert torch.equal(counted, truly)


@pytest.mark.usefixtures("launched")
def test_two_runs_give_the_same_bits(build: Build) -> None:
    runs = []
    for _ in range(2):
        router, x = build(SoftmaxTopKRouter, torch.float32), random(S, B, 8, seed=7)
        routing = router(x.requires_grad_())
        runs.append([*routing, *torch.autograd.grad(routing.gates.sum(), [x, router.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("mode", ["evaluation", "no_grad"])
def test_without_training_gradients_there_is_no_loss_and_no_record(
    build: Build, launched: list[int], mode: str
) -> None:
    x, gradients = random(S, B, 8, seed=7), list[Tensor]()
    for dtype in (torch.float32, torch.float64):
        router = build(SoftmaxTopKRouter, dtype)
        if mode == "evaluation":
            gates = router.eval()(x.to(dtype)).gates
            gradients += torch.autograd.grad(gates.square().sum(), router.weight)
        else:
            with torch.no_grad():
                router(x.to(dtype))
        assert router.metrics.reduce().as_dict() == {}
    assert launched == [1]
    assert mode == "no_grad" or distance(gradients[0], gradients[1]) <= LIMIT


class OwnRouter(SoftmaxTopKRouter):
    """Has another rule than its parent's kernels."""

    def select(self, logits: Tensor) -> Routing:
        """Selects by the smallest logits."""
        return super().select(-logits)


class Reversed:
    """Has another rule than what it is mixed into."""

    topk: int

    def select(self, logits: Tensor) -> Routing:
        """Selects by the smallest logits."""
        return functional.softmax_topk(-logits, self.topk)


class MixedRouter(Reversed, SoftmaxTopKRouter):
    """Takes its rule from a class that is no router."""


class RecordingRouter(SoftmaxTopKRouter):
    """Keeps what it records."""

    def _record(self, **recorded: Any) -> None:
        super()._record(**recorded)


class RenamedRouter(TopKSoftmaxRouter):
    """Has its parent's rule."""


def test_what_the_kernels_do_not_do_is_left_to_torch(build: Build, launched: list[int]) -> None:
    x = random(S, B, 8, seed=7)
    for kind, balancing in (
        (OwnRouter, {}),
        (MixedRouter, {}),
        (RecordingRouter, {}),
        (SoftmaxTopKRouter, {"loss": "seq_aux_loss"}),
        (SoftmaxTopKRouter, {"capacity_factor": 1.0}),
    ):
        build(kind, torch.float32, **balancing)(x)
    assert launched == []
    assert RenamedRouter.fused_rule == "topk_softmax"
    router = build(RenamedRouter, torch.float32)
    assert router.fits_kernels(x.new_zeros(3, E)) and not router.fits_kernels(x.new_zeros(0, E))
    router.num_experts = 1025
    assert not router.fits_kernels(x.new_zeros(3, 1025))


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a GPU: operations that are neither views nor allocations.

    Args:
        launched: names of kernels; others append theirs.
    """

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched, self.number = launched, 0

    def __enter__(self) -> "Launches":
        self.launched.clear()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.number = len(self.launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or "empty" in func.overloadpacket.__name__):
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))


class Launched:
    """Stands in for a kernel, whose interpreter would call torch; it launches one."""

    def __init__(self, counter: list[str], name: str) -> None:
        self.note = lambda *args, **constants: counter.append(name)

    def __getitem__(self, grid: Any) -> Any:
        return self.note


def test_kernels_route_in_few_launches(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, order and backward; on a GPU torch's stable sort alone is several."""
    router = build(SoftmaxTopKRouter, torch.float32)
    router.route(random_logits(S * B, E), None, num_sequences=B)  # allocates the metrics
    kernels: list[str] = []
    for module in (router_choice, router_losses, expert_order):
        for name in [each for each in vars(module) if each.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(kernels, name))
    logits, upstream = random_logits(S * B, E), torch.ones(S * B, K, device=DEVICE)

    def launches(is_taken: bool) -> list[int]:
        monkeypatch.setattr(fused, "takes", lambda *_: is_taken)
        with Launches(kernels) as forward:
            routing = router.route(logits, None, num_sequences=B)
        assert isinstance(routing, Routing)
        with Launches(kernels) as order:
            sort_by_expert(routing.experts, num_experts=E, in_kernels=is_taken)
        with Launches(kernels) as backward:
            torch.autograd.grad(routing.gates, logits, upstream)
        return [forward.number, order.number, backward.number]

    in_kernels = launches(True)
    assert in_kernels == [3, 2, 3]
    for fewer, more in zip(in_kernels, launches(False), strict=True):
        assert fewer < more
