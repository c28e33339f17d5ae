"""Streams: the same samples on any number of ranks, and after any resume."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from megatron.trainer.data.batch import Batch, make_batch, split_global_batch
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import WindowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError, DataError

S = 4
SIZES: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2}
ALONE: dict[str, Any] = {**SIZES, "data_parallel_rank": 0, "data_parallel_size": 1}


def source(name: str, num_windows: int, first_id: int) -> WindowSource:
    num_tokens = num_windows * S + 1
    return WindowSource(
        name=name,
        tokens=np.arange(first_id, first_id + num_tokens),
        start_token=0,
        stop_token=num_tokens,
        seq_length=S,
        seed=3,
    )


def stream(
    *, seed: int = 3, windows: int = 20, name: str = "b", weights: tuple[float, ...] = (3.0, 1.0)
) -> SampleStream:
    sources = [source("a", windows, 0), source(name, 7, 1000)]
    phases = [Phase(sources=("a", name), weights=weights)]
    return SampleStream(sources, phases, seq_length=S, seed=seed)


def first_ids(batches: list[Batch]) -> list[list[int]]:
    """The first token of each window, which names it, by micro-batch."""
    return [batch.tokens[:, 0].tolist() for batch in batches]


def test_batch_is_shifted_by_one_unmasked_and_numbered_from_0() -> None:
    batch = make_batch([np.array([1, 2, 3]), np.array([7, 8, 9])])
    assert batch.tokens.tolist() == [[1, 2], [7, 8]]
    assert batch.labels.tolist() == [[2, 3], [8, 9]]
    assert batch.loss_mask.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert batch.position_ids.tolist() == [[0, 1]]
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.loss_mask.dtype, batch.position_ids.dtype) == (torch.float32, torch.int64)
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_every_tensor_of_a_batch_moves() -> None:
    moved = make_batch([np.arange(3)]).to("meta")
    tensors = (moved.tokens, moved.labels, moved.loss_mask, moved.position_ids)
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_are_the_same_sets_of_samples_for_every_data_parallel_size(size: int) -> None:
    alone, ranks = stream(), [stream() for _ in range(size)]
    for _ in range(9):
        expected = first_ids(alone.next_global_batch(**ALONE))
        found = [
            first_ids(
                part.next_global_batch(**SIZES, data_parallel_rank=rank, data_parallel_size=size)
            )
            for rank, part in enumerate(ranks)
        ]
        # Micro-batch j of rank r is micro-batch j * size + r of the single rank.
        assert [found[i % size][i // size] for i in range(4)] == expected
    assert [part.state_dict() for part in ranks] == [alone.state_dict()] * size


def test_micro_batches_are_assigned_to_ranks_round_robin() -> None:
    def split(rank: int, size: int) -> list[list[int]]:
        ranges = split_global_batch(**SIZES, data_parallel_rank=rank, data_parallel_size=size)
        return [list(part) for part in ranges]

    assert split(0, 1) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert split(0, 2) == [[0, 1], [4, 5]]
    assert split(1, 2) == [[2, 3], [6, 7]]
    assert split(3, 4) == [[6, 7]]


@pytest.mark.parametrize(("size", "step"), [(3, 6), (8, 16)])
def test_global_batch_that_does_not_divide_is_refused_before_anything_is_drawn(
    size: int, step: int
) -> None:
    drawn = stream()
    message = (
        f"global_batch_size (8) must be a multiple of micro_batch_size x data parallel size (2 x"
        f" {size} = {step}); change --global-batch-size, --micro-batch-size or the number of ranks"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        drawn.next_global_batch(**SIZES, data_parallel_rank=0, data_parallel_size=size)
    assert drawn.consumed_samples == 0


def test_rank_outside_its_group_is_refused() -> None:
    message = (
        "data parallel rank 2 does not exist among 2 ranks; it must be 0 to 1; pass the rank in its"
        " own group"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        split_global_batch(**SIZES, data_parallel_rank=2, data_parallel_size=2)


def test_each_epoch_of_each_source_is_complete_and_in_another_order() -> None:
    drawn = stream()
    ids = [
        id_
        for _ in range(20)
        for part in first_ids(drawn.next_global_batch(**ALONE))
        for id_ in part
    ]
    a, b = [i for i in ids if i < 1000], [i for i in ids if i >= 1000]
    assert (len(a), len(b)) == (120, 40)
    assert drawn.consumed_per_source() == {"a": 120, "b": 40}
    for found, windows, first in ((a, 20, 0), (b, 7, 1000)):
        epochs = [found[i : i + windows] for i in range(0, len(found) - windows + 1, windows)]
        assert [sorted(epoch) for epoch in epochs] == [
            list(range(first, first + windows * S, S))
        ] * len(epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) >= 5


def test_resumed_stream_continues_as_if_never_stopped() -> None:
    whole = stream()
    expected = [first_ids(whole.next_global_batch(**ALONE)) for _ in range(12)]
    before = stream()
    for _ in range(5):
        before.next_global_batch(**ALONE)
    state = json.loads(json.dumps(before.state_dict()))
    after = stream()
    after.load_state_dict(state)
    assert [first_ids(after.next_global_batch(**ALONE)) for _ in range(7)] == expected[5:]
    assert after.state_dict() == whole.state_dict()


def test_batch_size_may_change_at_a_resume_and_no_sample_is_lost_or_repeated() -> None:
    alone = stream()
    expected = [
        i for _ in range(3) for part in first_ids(alone.next_global_batch(**ALONE)) for i in part
    ]
    first, second = stream(), stream()
    found = first_ids(first.next_global_batch(**ALONE))
    second.load_state_dict(first.state_dict())
    found += first_ids(
        second.next_global_batch(
            global_batch_size=16, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1
        )
    )
    assert [i for part in found for i in part] == expected


def test_state_holds_what_was_consumed_of_each_source() -> None:
    drawn = stream()
    drawn.next_global_batch(**ALONE)
    assert drawn.state_dict() == {
        "consumed_samples": 8,
        "consumed_per_source": {"a": 6, "b": 2},
        "seq_length": 4,
        "phases": [
            {
                "name": None,
                "inherited": False,
                "seed": 3,
                "num_samples": None,
                "sources": ["a", "b"],
                "weights": [0.75, 0.25],
                "windows_per_epoch": [20, 7],
                "consumed": [6, 2],
            }
        ],
    }


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"name": "c"}, "sources: checkpoint ['a', 'c'], this run ['a', 'b']"),
        ({"windows": 21}, "windows_per_epoch: checkpoint [21, 7], this run [20, 7]"),
        ({"weights": (1.0, 1.0)}, "weights: checkpoint [0.5, 0.5], this run [0.75, 0.25]"),
        (
            {"seed": 4, "name": "c"},
            "seed: checkpoint 4, this run 3; sources: checkpoint ['a', 'c'], this run ['a', 'b']",
        ),
    ],
)
def test_state_of_other_data_is_refused_with_every_difference(
    other: dict[str, Any], difference: str
) -> None:
    message = (
        f"the checkpoint was trained on other data: {difference}; a resumed run must read the same"
        " samples; restore the data flags, or start the data anew with --finetune"
    )
    begun = stream(**other)
    begun.next_global_batch(**ALONE)
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        stream().load_state_dict(begun.state_dict())


def test_state_of_another_length_is_refused() -> None:
    state = {**stream().state_dict(), "seq_length": 8}
    with pytest.raises(DataError, match="seq_length: checkpoint 8, this run 4"):
        stream().load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"consumed": [6, 3]},
        {"consumed": [9, -1]},
        {"consumed": [8]},
        {"consumed": None},
        {"consumed": [6.0, 2.0]},
        {"consumed": ["6", "2"]},
        {"sources": ["a", 1]},
        {"sources": []},
        {"weights": ["0.75", 0.25]},
        {"windows_per_epoch": [20]},
        {"seed": None},
        {"inherited": 1},
    ],
)
def test_state_that_contradicts_itself_is_refused_and_changes_nothing(
    change: dict[str, object],
) -> None:
    drawn = stream()
    drawn.next_global_batch(**ALONE)
    before = drawn.state_dict()
    state = {**before, "phases": [{**before["phases"][0], **change}]}
    message = (
        f"the checkpoint's data state has phases {state['phases']} and consumed_samples 8; each"
        " phase must name sources and give each a weight and a count >= 0, phases must begin in"
        " order, and the counts must add up to consumed_samples; load another checkpoint"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        drawn.load_state_dict(state)
    assert drawn.state_dict() == before


@pytest.mark.parametrize("phases", [None, [], "x", [1], {}])
def test_state_without_phases_is_refused(phases: object) -> None:
    with pytest.raises(DataError, match=re.escape(f"data state has phases {phases} and")):
        stream().load_state_dict({**stream().state_dict(), "phases": phases})


def test_sources_must_fit_the_stream() -> None:
    phases = [Phase(sources=("a",), weights=(1.0,))]
    with pytest.raises(ValueError, match="source 'a' has seq_length 4, not 8"):
        SampleStream([source("a", 5, 0)], phases, seq_length=8, seed=1)
    with pytest.raises(ValueError, match="phases draw from b, which is not among the sources a"):
        SampleStream(
            [source("a", 5, 0)], [Phase(sources=("b",), weights=(1.0,))], seq_length=S, seed=1
        )
    with pytest.raises(ValueError, match="1 sources, but 2 weights"):
        SampleStream(
            [source("a", 5, 0)], [Phase(sources=("a",), weights=(1.0, 1.0))], seq_length=S, seed=1
        )


def test_validation_is_in_the_order_of_the_data_and_the_same_each_time() -> None:
    valid = ValidationSet("v", source("v", 20, 0))
    for _ in range(2):
        found = [first_ids(batches) for batches in valid.batches(2, **ALONE)]
        assert found == [
            [[0, 4], [8, 12], [16, 20], [24, 28]],
            [[32, 36], [40, 44], [48, 52], [56, 60]],
        ]


@pytest.mark.parametrize("size", [2, 4])
def test_validation_micro_batches_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    valid = ValidationSet("v", source("v", 20, 0))
    ranks = [
        [
            first_ids(batches)
            for batches in valid.batches(
                2, **SIZES, data_parallel_rank=rank, data_parallel_size=size
            )
        ]
        for rank in range(size)
    ]
    merged = [[ranks[i % size][step][i // size] for i in range(4)] for step in range(2)]
    assert merged == [first_ids(batches) for batches in valid.batches(2, **ALONE)]


def test_validation_ends_with_the_last_whole_global_batch_and_never_wraps() -> None:
    valid = ValidationSet("v", source("v", 20, 0))
    assert len(list(valid.batches(100, **ALONE))) == 2
    assert [valid.num_global_batches(n, global_batch_size=8) for n in (1, 2, 3)] == [1, 2, 2]


def test_validation_set_smaller_than_a_global_batch_is_refused() -> None:
    valid = ValidationSet("v", source("v", 7, 0))
    message = (
        "validation set 'v' has 7 windows of 4 tokens, but one global batch takes 8; it must fill"
        " at least one; give it more data, or lower --global-batch-size"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        valid.num_global_batches(1, global_batch_size=8)
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        next(valid.batches(1, **ALONE))
