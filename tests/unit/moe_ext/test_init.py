"""Initial weights follow from the seed and the names alone, and have the stated distribution."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from packaging.version import Version
from torch import nn

from moe_ext import init
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.init import draw_truncated_, initialize_weights, random_stream, weight_shards
from moe_ext.layers.lora import TARGETS, LoRA
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS

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


as_torch_draws = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="trunc_normal_ of torch before 2.13 draws otherwise",
)


@as_torch_draws
@pytest.mark.parametrize("cutoff", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(3, 5), (1, 16), (7, 9), (2, 128, 97), (1024, 96), (523, 257)])
def test_truncated_draws_are_torchs(shape: tuple[int, ...], cutoff: float) -> None:
    """Bits, and where the stream stands afterwards; the shapes end within and between blocks."""
    found, expected = torch.empty(shape), torch.empty(shape)
    ours, theirs = (torch.Generator().manual_seed(11) for _ in range(2))
    draw_truncated_(found, std=0.02, bound=cutoff * 0.02, generator=ours)
    nn.init.trunc_normal_(expected, std=0.02, a=-cutoff * 0.02, b=cutoff * 0.02, generator=theirs)
    assert torch.equal(found, expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def drawn_alone(shard: ShardedTensor, model: MoEModelConfig) -> torch.Tensor:
    """Draw a whole tensor of a model of seed 5 with torch's functions, one matrix after another."""
    axes = shard.prepend_axis_num
    shape = shard.global_shape[axes:]
    name = f"5:{shard.key}{list(shard.global_offset[:axes])}"
    streams = {name: (drawn := torch.empty(shape))}
    if len(shape) > 2:
        streams = {f"{name}[{index}]": matrix for index, matrix in enumerate(drawn)}
    bound = (model.init_method_cutoff or 0.0) * model.init_method_std
    for stream, matrix in streams.items():
        generator = random_stream(stream)
        if shard.key.endswith(".a"):
            edge = shape[-1] ** -0.5
            nn.init.uniform_(matrix, -edge, edge, generator=generator)
        elif shard.key.endswith(".b"):
            matrix.zero_()
        else:
            std = model.init_method_std
            nn.init.trunc_normal_(matrix, std=std, a=-bound, b=bound, generator=generator)
    return drawn


@as_torch_draws
@pytest.mark.parametrize("name", ["olmoe", "jetmoe", "lora"])
def test_threads_draw_what_one_draws(
    name: str, groups: ProcessGroupCollection, three_threads: None
) -> None:
    jetmoe = MoEModelConfig(**{**PRESETS["jetmoe_tiny"], "num_layers": 1, "vocab_size": 512})
    model = jetmoe if name == "jetmoe" else MODEL
    lora = LoRA(rank=2, alpha=4.0, targets=TARGETS) if name == "lora" else None
    config = transformer_config(model, bf16=False)
    built = build_model(model, config, pg_collection=groups, seq_length=8, seed=5, lora=lora)
    shards = [each for each in weight_shards(list(built.chunks)) if len(each.local_shape) > 1]
    found = {shard.key.rpartition(".")[2] for shard in shards}
    assert found >= ({"weight", "a", "b"} if lora else {"weight"})
    for shard in shards:
        if shard.data is not None and len(shard.global_shape) - shard.prepend_axis_num > 1:
            assert torch.equal(shard.data, drawn_alone(shard, model)), shard.key


class Two(nn.Module):
    """A model whose rank holds two cuts of one matrix, and one of a meta tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [Holder((12, 10), Part(0, rank, 3)) for rank in (0, 2)]
        self.meta = nn.Parameter(torch.empty(5, 4, device="meta"))

    def sharded_state_dict(self) -> dict[str, Any]:
        parts = {str(n): each.sharded_state_dict()["weight"] for n, each in enumerate(self.parts)}
        return {**parts, "meta": ShardedTensor.from_rank_offsets("meta", self.meta)}


def test_a_matrix_is_drawn_once_and_a_meta_tensor_never(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def draw_and_count(full: torch.Tensor, **settings: Any) -> None:
        calls.append(full.shape)
        draw_truncated_(full, **settings)

    monkeypatch.setattr(init, "draw_truncated_", draw_and_count)
    two = Two()
    initialize_weights([two], seed=5, std=0.02, cutoff=3.0)
    assert calls == [(12, 10)]
    whole = draw((12, 10), Part(0, 0, 1))
    assert torch.equal(two.parts[0].weight, whole[:4])
    assert torch.equal(two.parts[1].weight, whole[8:])


def test_as_many_are_drawn_at_a_time_as_there_are_threads(
    monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    together = threading.Barrier(3)  # opens when three have come; nine come in three rounds
    running: list[int] = []
    most = []

    def draw_together(full: torch.Tensor, **settings: Any) -> None:
        running.append(1)
        together.wait(timeout=60)
        most.append(len(running))
        together.wait(timeout=60)
        running.pop()
        draw_truncated_(full, **settings)

    monkeypatch.setattr(init, "draw_truncated_", draw_together)
    draw((9, 6, 10), Part(0, 0, 1))
    assert most == [3] * 9


def test_an_error_of_a_thread_is_raised(
    monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    def refuse(full: torch.Tensor, **settings: Any) -> None:
        raise MemoryError(f"no room for {tuple(full.shape)}")

    monkeypatch.setattr(init, "draw_truncated_", refuse)
    with pytest.raises(MemoryError, match=r"no room for \(6, 10\)"):
        draw((4, 6, 10), Part(0, 0, 1))
