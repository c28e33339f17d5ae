"""Documents within a sequence, and the balanced split of a sequence over ranks."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.data.batch import Batch, find_borders, make_batch
from megatron.trainer.data.batch_views import DocumentRule, separate_documents, shard_positions
from moe_ext.layers.context_parallel import chunk_order, query_parts

EOD = 0
ROWS = st.lists(
    st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=3
)  # a third of the tokens end a document


def batch_of(rows: list[list[int]]) -> Batch:
    tokens = torch.tensor(rows)
    starts = [[at > 0 and row[at - 1] == EOD for at in range(len(row))] for row in rows]
    return Batch(
        tokens=tokens,
        labels=tokens + 10,
        loss_mask=torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)),
        position_ids=torch.arange(tokens.shape[1])[None],
        document_starts=torch.tensor(starts),
        borders=find_borders(np.array(starts)),
    )


def rule(*, positions: bool = True, mask: bool = True, is_varlen: bool = False) -> DocumentRule:
    return DocumentRule(
        eod=EOD, reset_position_ids=positions, reset_attention_mask=mask, is_varlen=is_varlen
    )


@given(rows=ROWS)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_positions_and_mask_equal_those_of_a_loop_over_each_row(rows: list[list[int]]) -> None:
    separated = separate_documents(batch_of(rows), rule())
    mask = separated.attention_mask()
    assert mask is not None
    assert mask.shape == (len(rows), 1, 12, 12)
    for number, row in enumerate(rows):
        start = 0
        for query, token in enumerate(row):
            assert separated.position_ids[number, query] == query - start
            seen = [not hidden for hidden in mask[number, 0, query].tolist()]
            assert seen == [start <= key <= query for key in range(12)]
            if token == EOD:
                start = query + 1


@given(rows=ROWS)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_borders_are_where_a_loop_over_all_rows_finds_them(rows: list[list[int]]) -> None:
    flat = [token for row in rows for token in row]
    expected = [at for at in range(len(flat)) if at % 12 == 0 or flat[at - 1] == EOD]
    separated = separate_documents(batch_of(rows), rule(is_varlen=True))
    assert separated.is_varlen and separated.attention_mask() is None
    assert torch.equal(
        separated.position_ids, separate_documents(batch_of(rows), rule()).position_ids
    )
    for batch in (separated, separated.to("meta"), shard_positions(separated, rank=1, size=2)):
        assert batch.borders is not None and batch.borders.device.type == "cpu"
        assert batch.is_varlen and batch.borders.tolist() == [*expected, len(flat)]
    assert separated.to("meta").tokens.device.type == "meta"


def test_windows_bring_their_borders() -> None:
    windows = [np.arange(6), np.arange(6)]
    starts = [np.array([2, 4]), np.array([], np.int64)]
    batch = make_batch(windows, starts)
    assert batch.borders is not None and batch.borders.tolist() == [0, 2, 4, 5, 10]
    assert make_batch(windows).borders is None


def test_each_reset_happens_only_where_it_is_set() -> None:
    batch = batch_of([[1, EOD, 1, 1]])
    only_mask = separate_documents(batch, rule(positions=False))
    assert only_mask.position_ids.tolist() == [[0, 1, 2, 3]]
    assert only_mask.attention_mask() is not None
    only_positions = separate_documents(batch, rule(mask=False))
    assert only_positions.position_ids.tolist() == [[0, 1, 0, 1]]
    assert only_positions.attention_mask() is None
    assert not separate_documents(batch, rule(mask=False, is_varlen=True)).is_varlen
    assert batch.attention_mask() is None


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hold_every_position_once_with_its_own_mask_and_place(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 3, (2, 12), generator=generator).tolist()
    whole = separate_documents(batch_of(rows), rule())
    whole_mask = whole.attention_mask()
    assert whole_mask is not None
    seen = []
    for rank in range(size):
        part = shard_positions(whole, rank=rank, size=size)
        assert part.places is not None
        places = part.places.tolist()
        half = 12 // (2 * size)
        last = 12 - (rank + 1) * half
        assert places == [
            *range(rank * half, (rank + 1) * half),
            *range(last, last + half),
        ]
        seen += places
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, places]), name
        mask = part.attention_mask()
        assert mask is not None
        assert torch.equal(mask, whole_mask[:, :, places])
        assert part.loss_tokens == whole.loss_mask.sum()
    assert sorted(seen) == list(range(12))


def test_batch_that_does_not_say_where_documents_begin_is_refused() -> None:
    batch = dataclasses.replace(batch_of([[1, EOD, 1, 1]]), document_starts=None)
    with pytest.raises(ValueError, match="the batch has no document_starts"):
        separate_documents(batch, rule())
    batch = dataclasses.replace(batch_of([[1, EOD, 1, 1]]), borders=None)
    with pytest.raises(ValueError, match="or no borders"):
        separate_documents(batch, rule(is_varlen=True))


def test_single_rank_keeps_the_batch_unchanged() -> None:
    batch = batch_of([[1, 2, 3, 4]])
    assert shard_positions(batch, rank=0, size=1) is batch


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_attention_mask_is_of_the_positions_the_batch_was_split_into(size: int) -> None:
    length = 4 * size  # two positions a chunk
    order = chunk_order(size)
    gathered = list(itertools.chain(*([2 * chunk, 2 * chunk + 1] for chunk in order)))
    for rank in range(size):
        mine = gathered[rank * 4 : (rank + 1) * 4]
        parts = list(query_parts(size, rank, 4))
        assert [mine[rows][-1] + 1 for rows, _ in parts] == [seen for _, seen in parts]
        batch = shard_positions(batch_of([list(range(length))]), rank=rank, size=size)
        places = list(range(length)) if batch.places is None else batch.places.tolist()
        assert places == mine
    work = [sum(seen for _, seen in query_parts(size, rank, 4)) for rank in range(size)]
    assert len(set(work)) == 1, "every rank looks at as many keys"
