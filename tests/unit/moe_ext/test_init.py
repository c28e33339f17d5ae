"""Initial weights follow from the seed and the names alone, and have the stated distribution."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.init import initialize_weights
from moe_ext.layers.transformer import transformer_config

MODEL = MoEModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    vocab_size=2048,
)
DENSE = dataclasses.replace(MODEL, num_experts=None, ffn_hidden_size=96)
Weights = dict[str, torch.Tensor]


@pytest.fixture
def groups(single_rank: ProcessGroupCollection) -> Iterator[ProcessGroupCollection]:
    yield single_rank


def build(groups: ProcessGroupCollection, seed: int, model: MoEModelConfig = MODEL) -> Weights:
    config = transformer_config(model, bf16=False)
    chunk = build_model(model, config, pg_collection=groups, seq_length=8, seed=seed).chunks[0]
    return {name: p.detach().clone() for name, p in chunk.named_parameters()}


def share_equal(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left == right).double().mean().item()


def matrices(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if weight.dim() > 1}


@pytest.mark.parametrize("model", [MODEL, DENSE])
def test_same_seed_gives_the_same_weights(
    model: MoEModelConfig, groups: ProcessGroupCollection
) -> None:
    torch.manual_seed(1)
    first = build(groups, 5, model)
    torch.manual_seed(2)  # torch's own stream must not matter
    second = build(groups, 5, model)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize("model", [MODEL, DENSE])
def test_another_seed_changes_every_matrix(
    model: MoEModelConfig, groups: ProcessGroupCollection
) -> None:
    first, second = build(groups, 5, model), build(groups, 6, model)
    for name, weight in matrices(first).items():
        assert share_equal(weight, second[name]) < 0.01, name


@pytest.mark.parametrize("model", [MODEL, DENSE])
def test_no_two_matrices_are_equal(model: MoEModelConfig, groups: ProcessGroupCollection) -> None:
    """Layers, experts, gate and up, and matrices of one shape all have streams of their own."""
    flat = []
    for weight in matrices(build(groups, 5, model)).values():
        rows = weight.flatten(0, -2)  # every matrix of a stack, row by row
        flat += [row[:16] for row in rows]
    rows = torch.stack(flat)
    assert len(torch.unique(rows, dim=0)) == len(rows) > 2048


@pytest.mark.parametrize("model", [MODEL, DENSE])
def test_matrices_are_truncated_normal_with_olmoes_deviation(
    model: MoEModelConfig, groups: ProcessGroupCollection
) -> None:
    for name, weight in matrices(build(groups, 5, model)).items():
        assert weight.abs().max() <= 0.06, name
        # A normal distribution cut at 3 deviations keeps 0.98658 of its deviation. Five standard
        # errors of a sample of this size, which are 1 / sqrt(2 n) and 1 / sqrt(n).
        error = 5 / weight.numel() ** 0.5
        deviation = 0.02 * 0.98658
        assert weight.std().item() == pytest.approx(deviation, rel=error), name
        assert abs(weight.mean().item()) <= error * deviation, name


def test_cutoff_and_deviation_are_the_models(groups: ProcessGroupCollection) -> None:
    model = dataclasses.replace(MODEL, init_method_std=0.5, init_method_cutoff=1.0)
    weight = build(groups, 5, model)["embedding.word_embeddings.weight"]
    assert 0.49 < weight.abs().max() <= 0.5
    # A normal distribution cut at 1 deviation keeps 0.53956 of its deviation.
    assert weight.std().item() == pytest.approx(0.5 * 0.53956, rel=0.01)


def test_norms_start_as_ones(groups: ProcessGroupCollection) -> None:
    vectors = {name: w for name, w in build(groups, 5).items() if w.dim() == 1}
    # Two a layer, q and k besides, and the final one.
    assert len(vectors) == 2 * 4 + 1
    for name, weight in vectors.items():
        assert torch.equal(weight, torch.ones_like(weight)), name


@dataclasses.dataclass
class Part:
    """A rank's part of one global tensor, by the axis that is cut."""

    axis: int
    rank: int
    size: int
    layer: tuple[int, int, int] | None = None


class Holder(nn.Module):
    """A model of one tensor, of which this "rank" holds a part."""

    def __init__(self, shape: tuple[int, ...], part: Part) -> None:
        super().__init__()
        local = list(shape)
        local[part.axis] //= part.size
        self.weight = nn.Parameter(torch.full(local, torch.nan))
        self.part = part

    def sharded_state_dict(self) -> dict[str, Any]:
        part = self.part
        prepended = [] if part.layer is None else [part.layer]
        cut = (part.axis + len(prepended), part.rank, part.size)
        return {
            "weight": ShardedTensor.from_rank_offsets(
                "key", self.weight, *prepended, cut, prepend_axis_num=len(prepended)
            )
        }


def draw(shape: tuple[int, ...], part: Part, *, seed: int = 5) -> torch.Tensor:
    holder = Holder(shape, part)
    initialize_weights([holder], seed=seed, std=0.02, cutoff=3.0)
    return holder.weight.detach()


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((12, 10), 0),
        ((12, 10), 1),
        ((4, 6, 10), 0),
        ((4, 6, 10), 2),
        ((4, 2, 6, 10), 0),
        ((4, 2, 6, 10), 2),
    ],
    ids=["column", "row", "experts", "expert rows", "gated experts", "gated expert rows"],
)
def test_ranks_draw_slices_of_one_tensor(shape: tuple[int, ...], axis: int) -> None:
    whole = draw(shape, Part(axis, 0, 1))
    assert not whole.isnan().any()
    halves = [draw(shape, Part(axis, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim=axis), whole)
    assert not torch.equal(*halves)


def test_layers_draw_from_their_own_streams_on_any_stage() -> None:
    layers = [draw((4, 6, 10), Part(0, 0, 1, layer=(0, layer, 3))) for layer in range(3)]
    again = draw((4, 6, 10), Part(0, 1, 2, layer=(0, 2, 3)))
    assert torch.equal(again, layers[2][2:])
    for other in layers[:2]:
        assert share_equal(layers[2], other) < 0.01


def test_vectors_are_left_alone() -> None:
    assert draw((6,), Part(0, 0, 1)).isnan().all()


def test_lower_precision_rounds_the_same_draw(groups: ProcessGroupCollection) -> None:
    """bf16 and fp32 runs of one seed start from the same weights, rounded."""
    exact = build(groups, 5)
    config = transformer_config(MODEL, bf16=True)
    chunk = build_model(MODEL, config, pg_collection=groups, seq_length=8, seed=5).chunks[0]
    for name, p in chunk.named_parameters():
        assert p.dtype == torch.bfloat16, name
        assert torch.equal(p, exact[name].bfloat16()), name


def test_without_a_cutoff_weights_are_of_the_whole_normal_distribution(
    groups: ProcessGroupCollection,
) -> None:
    model = dataclasses.replace(MODEL, init_method_cutoff=None, init_method_std=0.5)
    weights = matrices(build(groups, 5, model))
    values = torch.cat([weight.flatten() for weight in weights.values()]).double() / 0.5
    assert values.std().item() == pytest.approx(1.0, rel=0.01)
    tail = (values.abs() > 3).double().mean().item()
    assert tail == pytest.approx(0.0027, rel=0.1)
