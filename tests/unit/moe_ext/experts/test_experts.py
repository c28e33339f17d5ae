"""Expert backends against each other and against the formula; the module's marks and shards."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.experts import (
    EXPERT_BACKENDS,
    ExpertFunction,
    ExpertMLP,
    ProjectionFunction,
    Use,
    backends,
    choose_backend,
    look_up_backend,
    register_expert_backend,
)
from moe_ext.experts.grouped_gemm import grouped_gemm_experts, grouped_gemm_projection
from moe_ext.experts.slots import sort_by_expert

ConfigMaker = Callable[..., TransformerConfig]

WIDTH, FFN = 5, 3
LOOP = look_up_backend("loop")
LAYOUTS = {
    "random": [4, 1, 3, 2],
    "empty experts": [0, 6, 0, 4],
    "one token": [0, 0, 1, 0],
    "all on one expert": [0, 9, 0, 0],
    "no token": [0, 0, 0, 0],
}


def random_inputs(counts: list[int], *, seed: int = 0) -> list[Tensor]:
    """hidden, weight1, weight2, probs, all wanting gradients, float64."""
    generator = torch.Generator().manual_seed(seed)
    t, e = sum(counts), len(counts)
    shapes = [(t, WIDTH), (e, 2, FFN, WIDTH), (e, WIDTH, FFN), (t,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def formula(hidden: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, probs: Tensor) -> Tensor:
    """Every token by itself, every sum written out."""
    owner = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    rows = []
    for x, e, p in zip(hidden, owner, probs, strict=True):
        gate = (w1[e, 0] * x).sum(1)
        up = (w1[e, 1] * x).sum(1)
        middle = p * up * gate / (1 + torch.exp(-gate))
        rows.append((w2[e] * middle).sum(1))
    return torch.stack(rows)


def output_and_gradients(
    backend: ExpertFunction, counts: list[int], inputs: list[Tensor]
) -> list[Tensor]:
    hidden, w1, w2, probs = inputs
    output = backend(hidden, w1, w2, torch.tensor(counts), probs)
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    # float64 sums of at most ten terms of order one: rounding stays near 1e-15.
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_loop_equals_the_formula_with_all_gradients() -> None:
    counts = LAYOUTS["random"]
    inputs = random_inputs(counts)
    actual = output_and_gradients(look_up_backend("loop").experts, counts, inputs)
    assert_all_close(actual, output_and_gradients(formula, counts, inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_equals_loop_with_all_gradients(layout: str) -> None:
    counts = LAYOUTS[layout]
    inputs = random_inputs(counts)
    actual = output_and_gradients(look_up_backend("grouped").experts, counts, inputs)
    assert_all_close(actual, output_and_gradients(look_up_backend("loop").experts, counts, inputs))


def test_grouped_gradients_equal_finite_differences() -> None:
    hidden, w1, w2, probs = random_inputs([2, 0, 1])
    counts = torch.tensor([2, 0, 1])
    grouped = look_up_backend("grouped").experts
    assert torch.autograd.gradcheck(
        lambda x, a, b, p: grouped(x, a, b, counts, p), (hidden, w1, w2, probs)
    )


def test_grouped_computes_only_the_gradients_asked_for() -> None:
    counts = LAYOUTS["random"]
    hidden, w1, w2, probs = random_inputs(counts)
    w1.requires_grad_(False)
    output = look_up_backend("grouped").experts(hidden, w1, w2, torch.tensor(counts), probs)
    output.sum().backward()
    assert w1.grad is None
    assert w2.grad is not None
    assert hidden.grad is not None


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_bf16_tokens_with_fp32_probs_give_bf16(backend: str) -> None:
    hidden, w1, w2, probs = (x.detach().bfloat16() for x in random_inputs([2, 2]))
    output = look_up_backend(backend).experts(hidden, w1, w2, torch.tensor([2, 2]), probs.float())
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["random", "empty experts", "one token", "all on one expert"])
def test_the_grouped_gemm_path_equals_loop_in_bf16(layout: str) -> None:
    # What CUDA runs; torch computes it on the CPU too. Sizes fit the kernel's 16-byte rows.
    counts = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    t, e = sum(counts), len(counts)
    shapes = [(t, 16), (e, 2, 8, 16), (e, 16, 8), (t,)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    inputs = [x.requires_grad_() for x in (*inputs[:3], inputs[3].float())]
    actual = output_and_gradients(grouped_gemm_experts, counts, inputs)
    expected = output_and_gradients(look_up_backend("loop").experts, counts, inputs)
    for a, b in zip(actual, expected, strict=True):
        # Rounding of intermediate gradients to bf16 (2^-8) differs between the two, per element.
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())


def test_the_grouped_gemm_path_refuses_sizes_its_kernel_cannot_take() -> None:
    hidden, w1, w2, probs = random_inputs([2, 2])
    message = (
        "hidden_size (5) must be a multiple of 8 for the grouped GEMM; change it, or use "
        "expert_backend 'loop'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_gemm_experts(hidden, w1, w2, torch.tensor([2, 2]), probs)


def test_counts_that_do_not_sum_to_the_tokens_are_refused() -> None:
    hidden, w1, w2, probs = random_inputs([2, 2])
    message = "tokens_per_expert sums to 3, but there are 4 tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        look_up_backend("grouped").experts(hidden, w1, w2, torch.tensor([2, 1]), probs)


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    message = (
        "unknown expert backend 'groupd'; known: cute, grouped, loop, megablocks, te, triton; did"
        " you mean 'grouped'?"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        look_up_backend("groupd")


def test_a_registered_backend_is_found_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ext.experts.backends.EXPERT_BACKENDS", dict(EXPERT_BACKENDS))
    register_expert_backend("formula", formula)
    assert look_up_backend("formula").experts is formula
    with pytest.raises(ValueError, match=re.escape("expert backend 'loop' is already registered")):
        register_expert_backend("loop", formula)


def projection_of(name: str) -> ProjectionFunction:
    projection = look_up_backend(name).projection
    assert projection is not None
    return projection


def projection_and_gradients(
    projection: ProjectionFunction, counts: list[int], *, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, weight = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((sum(counts), 8), (len(counts), 16, 8))
    )
    output = projection(rows, weight, torch.tensor(counts))
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return [output, *torch.autograd.grad(output, [rows, weight], upstream)]


def projection_formula(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every row by itself."""
    owner = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    return torch.stack([(weight[e] * x).sum(1) for x, e in zip(rows, owner, strict=True)])


def test_loop_projection_equals_the_formula_with_all_gradients() -> None:
    actual = projection_and_gradients(projection_of("loop"), LAYOUTS["random"])
    assert_all_close(actual, projection_and_gradients(projection_formula, LAYOUTS["random"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_projection_equals_loop_with_all_gradients(layout: str) -> None:
    actual = projection_and_gradients(projection_of("grouped"), LAYOUTS[layout])
    expected = projection_and_gradients(projection_of("loop"), LAYOUTS[layout])
    assert_all_close(actual, expected)


def test_grouped_projection_computes_only_the_gradients_asked_for() -> None:
    rows = torch.ones(2, 3)
    weight = torch.ones(1, 4, 3, requires_grad=True)
    projection_of("grouped")(rows, weight, torch.tensor([2])).sum().backward()
    assert rows.grad is None
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((1, 4, 3), 2.0))


@pytest.mark.parametrize("layout", ["random", "empty experts", "one token", "all on one expert"])
def test_the_grouped_gemm_projection_equals_loop_in_bf16(layout: str) -> None:
    counts = LAYOUTS[layout]
    actual = projection_and_gradients(grouped_gemm_projection, counts, dtype=torch.bfloat16)
    loop = projection_of("loop")
    expected = projection_and_gradients(loop, counts, dtype=torch.bfloat16)
    for a, b in zip(actual, expected, strict=True):
        # One product each, rounded to bf16 (2^-8) once.
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * b.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8, 5), "the rows' width (5)"), ((1, 5, 8), "an expert's outputs on this rank (5)")],
)
def test_the_grouped_gemm_projection_refuses_sizes_its_kernel_cannot_take(
    shape: tuple[int, int, int], message: str
) -> None:
    expected = f"{message} must be a multiple of 8 for the grouped GEMM; change it, or use"
    with pytest.raises(ValueError, match=re.escape(expected)):
        grouped_gemm_projection(torch.ones(2, shape[2]), torch.ones(shape), torch.tensor([2]))


def test_a_backend_without_a_projection_serves_the_feed_forward_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_ext.experts.backends.EXPERT_BACKENDS", dict(EXPERT_BACKENDS))
    monkeypatch.setattr("moe_ext.experts.choose.EXPERT_BACKENDS", backends.EXPERT_BACKENDS)
    register_expert_backend("formula", formula)
    use = Use(device_type="cpu", dtype=torch.float64, widths=(8,))
    assert choose_backend("formula", use).backend.experts is formula
    message = (
        "expert_backend 'formula' has no projection, which moa attention is made of; give one to"
        " register_expert_backend, or use expert_backend cute or grouped or loop"
    )
    with_attention = dataclasses.replace(use, has_attention=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_backend("formula", with_attention)
    with pytest.raises(ValueError, match="this expert backend has no projection"):
        order = sort_by_expert(torch.zeros(2, 1, dtype=torch.int64), num_experts=1)
        look_up_backend("formula").project_slots(torch.ones(2, 3), torch.ones(1, 4, 3), order)
    register_expert_backend("both", formula, projection_formula)
    assert choose_backend("both", with_attention).backend.projection is projection_formula


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((3, None), "expert backend 'new' is 3; give a function"),
        ((formula, 3), "the projection of expert backend 'new' is 3; give a function or None"),
    ],
)
def test_what_cannot_be_called_is_no_backend(functions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        register_expert_backend("new", *functions)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_one_expert_with_weight_one_is_a_dense_swiglu_block(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker, backend: str
) -> None:
    config = make_config(num_moe_experts=1, moe_router_topk=1, init_method_std=0.5)
    torch.manual_seed(0)
    experts = ExpertMLP(1, config, pg_collection=single_rank, backend=look_up_backend(backend))
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    output, bias = experts(hidden, torch.tensor([7]), torch.ones(7, dtype=torch.float64))
    gate, up = experts.weight1[0]
    dense = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ experts.weight2[0].T
    assert bias is None
    inputs = [hidden, experts.weight1, experts.weight2]
    upstream = torch.randn_like(output)
    assert_all_close(
        [output, *torch.autograd.grad(output, inputs, upstream)],
        [dense, *torch.autograd.grad(dense, inputs, upstream)],
    )


def test_weights_are_initialised_and_marked_for_megatron_core(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    experts = ExpertMLP(
        4, make_config(), pg_collection=single_rank, backend=look_up_backend("loop")
    )
    assert experts.weight1.shape == (4, 2, 6, 8)
    assert experts.weight2.shape == (4, 8, 6)
    # Three standard errors of 384 and of 192 draws; megatron-core scales output layers.
    assert experts.weight1.std().item() == pytest.approx(0.02, rel=0.11)
    assert experts.weight2.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.16)
    for weight in experts.parameters():
        assert weight.allreduce is False
        assert weight.tensor_model_parallel is True
        assert weight.partition_dim == 2


def test_it_builds_on_the_meta_device(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    with torch.device("meta"):
        experts = ExpertMLP(
            4, make_config(), pg_collection=single_rank, backend=look_up_backend("loop")
        )
    assert all(weight.is_meta for weight in experts.parameters())


class Rank:
    """A process group as far as a layout is concerned."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_the_shards_of_all_ranks_tile_the_global_weights_once(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    tiles = {"weight1": torch.zeros(3, 4, 2, 6, 8), "weight2": torch.zeros(3, 4, 8, 6)}
    for ep, etp, dp in ((a, b, c) for a in range(2) for b in range(3) for c in range(2)):
        single_rank.ep, single_rank.expt_tp = Rank(ep, 2), Rank(etp, 3)
        single_rank.expt_dp = Rank(dp, 2)
        experts = ExpertMLP(
            2, make_config(), pg_collection=single_rank, backend=look_up_backend("loop")
        )
        shards = experts.sharded_state_dict("layers.experts.", ((0, 1, 3),))
        for name, tile in tiles.items():
            shard = shards[f"layers.experts.{name}"]
            assert shard.data is getattr(experts, name)
            assert shard.global_shape == tuple(tile.shape)
            assert shard.replica_id == (0, 0, dp)
            if dp == 0:
                tile[shard.global_slice()] += 1
    for tile in tiles.values():
        assert torch.equal(tile[1], torch.ones_like(tile[1]))
        assert not tile[[0, 2]].any()


def test_a_width_that_does_not_divide_is_refused(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    single_rank.expt_tp = Rank(0, 4)
    message = "moe_ffn_hidden_size (6) must be a multiple of the expert tensor parallel size (4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        ExpertMLP(4, make_config(), pg_collection=single_rank, backend=LOOP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear is True, but the experts have no biases"),
        ({"gated_linear_unit": False}, "the experts are SwiGLU, but gated_linear_unit is False"),
    ],
)
def test_other_experts_are_refused(
    single_rank: ProcessGroupCollection,
    make_config: ConfigMaker,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ExpertMLP(
            4, make_config(**changes), pg_collection=single_rank, backend=look_up_backend("loop")
        )
