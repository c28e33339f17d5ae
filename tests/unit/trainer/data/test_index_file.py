"""An index is checked in blocks and looked up in place, with the results of whole arrays."""

import hashlib
import re
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data import index_file
from megatron.trainer.data.build import build_data
from megatron.trainer.data.document_borders import look_at_ends
from megatron.trainer.data.index_file import MAGIC
from megatron.trainer.data.indexed import TokenFacts, open_tokens
from megatron.trainer.data.source import WindowSource
from megatron.trainer.errors import DataError

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def tiny_blocks() -> Any:
    """Let every file have many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "_BLOCK_ITEMS", 3)
        patch.setattr(index_file, "_WINDOW_DOCUMENTS", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


def craft(
    prefix: Path,
    lengths: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64] | None = None,
    offsets: npt.NDArray[np.int64] | None = None,
) -> str:
    """Write a token file of int16 tokens, of which the first 20,000 are their own positions."""
    if bounds is None:
        bounds = np.arange(len(lengths) + 1)
    if offsets is None:
        offsets = (np.cumsum(lengths) - lengths) * 2
    header = struct.pack("<9sQBQQ", MAGIC, 1, 3, len(lengths), len(bounds))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(header + lengths.astype("<i4").tobytes())
        file.write(offsets.astype("<i8").tobytes() + bounds.astype("<i8").tobytes())
    (np.arange(lengths.sum()) % 20_000).astype("<i2").tofile(f"{prefix}.bin")
    return str(prefix)


def verdict_by_hand(
    lengths: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]
) -> str | None:
    """What whole arrays say is wrong first."""
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0))
        return f"sequence {at} has length {lengths[at]};"
    expected = (np.cumsum(lengths) - lengths) * 2
    if (offsets != expected).any():
        at = int(np.argmax(offsets != expected))
        return f"sequence {at} starts at byte {offsets[at]}, but"
    if bounds[0] != 0 or bounds[-1] != len(lengths):
        return f"document bounds go from {bounds[0]} to {bounds[-1]};"
    if (np.diff(bounds) < 0).any():
        at = int(np.argmax(np.diff(bounds) < 0))
        return f"document {at} goes from sequence {bounds[at]} to {bounds[at + 1]};"
    return None


lengths_of_sequences = st.lists(st.integers(0, 5), min_size=1, max_size=14).filter(any)


@QUICK
@given(
    data=st.data(), lengths=lengths_of_sequences, kind=st.sampled_from(["right", "offset", "bound"])
)
def test_damage_is_found_and_named_wherever_blocks_end(
    folder: Path, data: st.DataObject, lengths: list[int], kind: str
) -> None:
    sizes = np.array(lengths)
    offsets, bounds = (np.cumsum(sizes) - sizes) * 2, np.arange(len(sizes) + 1)
    victim = {"right": None, "offset": offsets, "bound": bounds}[kind]
    if victim is not None:
        victim[data.draw(st.integers(0, len(victim) - 1))] += data.draw(st.sampled_from([-2, 1, 3]))
    prefix = craft(folder / "damaged", sizes, bounds, offsets)
    expected = verdict_by_hand(sizes, offsets, bounds)
    if expected is None:
        assert open_tokens(prefix).num_tokens == sizes.sum()
    else:
        with pytest.raises(DataError, match=re.escape(f"{prefix}.idx: {expected}")):
            open_tokens(prefix)


@QUICK
@given(data=st.data(), lengths=lengths_of_sequences)
def test_documents_are_looked_up_as_in_an_array_of_their_starts(
    folder: Path, data: st.DataObject, lengths: list[int]
) -> None:
    """Empty documents, empty sequences and documents of several sequences included."""
    sizes = np.array(lengths)
    inner = data.draw(st.lists(st.integers(0, len(sizes)), max_size=12))
    bounds = np.array([0, *sorted(inner), len(sizes)])
    file = open_tokens(craft(folder / "starts", sizes, bounds))
    starts = np.concatenate([[0], np.cumsum(sizes)])[bounds]
    found = file.document_starts
    assert found[:].tolist() == starts[:-1].tolist()
    assert [found.bound(n) for n in range(len(bounds))] == starts.tolist()
    for token in range(file.num_tokens + 2):
        assert found.first_from(token) == np.searchsorted(starts[:-1], token)
        for stop in range(token, file.num_tokens + 2):
            inside = (starts[:-1] >= token) & (starts[:-1] < stop)
            assert found.between(token, stop).tolist() == starts[:-1][inside].tolist()


@QUICK
@given(lengths=lengths_of_sequences, share=st.integers(1, 99))
def test_split_is_at_the_start_nearest_to_the_share(
    folder: Path, lengths: list[int], share: int
) -> None:
    sizes = np.array([2, *lengths, 2])
    prefix, total = craft(folder / "split", sizes), int(sizes.sum())
    cfg = DataConfig(data_path=(prefix,), split=f"{share},{100 - share}", num_workers=0)
    (source,) = build_data(cfg, vocab_size=1 << 15, seq_length=1, seed=1).train.sources
    starts = np.cumsum(sizes) - sizes
    inside = starts[starts > 0]
    goal = 1 / (1 + (100 - share) / share) * total
    assert source.num_tokens == inside[np.argmin(np.abs(inside - goal))]


@pytest.mark.parametrize(
    ("lengths", "tails"), [((3, 0, 0, 2, 4, 0), 3), ((0, 0, 5), 1), ((1, 2), 2)]
)
def test_empty_documents_have_no_end_to_look_at(
    folder: Path, lengths: Sequence[int], tails: int
) -> None:
    file = open_tokens(craft(folder / "ends", np.array(lengths)))
    source = WindowSource(
        name="a",
        tokens=file.tokens,
        start_token=0,
        stop_token=file.num_tokens,
        seq_length=1,
        seed=1,
        document_starts=file.document_starts,
    )
    found = look_at_ends(source, eod=file.num_tokens - 1)
    assert (found.num_sampled, found.num_ended, found.num_inside) == (tails, 1, 0)


def test_fingerprint_is_what_checkpoints_and_manifests_have_recorded(folder: Path) -> None:
    prefix = craft(folder / "recorded", np.array([4, 0, 7, 1]))
    whole = b"".join(Path(prefix + suffix).read_bytes() for suffix in (".idx", ".bin"))
    recorded = hashlib.sha256(b"token file, fingerprint 1\n" + whole).hexdigest()
    assert open_tokens(prefix).facts.fingerprint == recorded


def test_what_another_rank_verified_is_not_read_again_but_must_have_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = craft(folder / "other", np.array([4, 0, 7, 1]))
    first = open_tokens(prefix)
    monkeypatch.delattr(index_file.np, "cumsum")  # nothing is added up
    again = open_tokens(prefix, verified=first.facts)
    assert again.facts == first.facts
    assert again.document_starts[:].tolist() == [0, 4, 4, 11]
    monkeypatch.undo()

    def verified(**other: Any) -> TokenFacts:
        return TokenFacts(**{**vars(first.facts), **other})

    with pytest.raises(DataError, match="has 4 documents in int16 tokens, but when"):
        open_tokens(prefix, verified=verified(num_documents=5))
    with pytest.raises(DataError, match=r"bin has 24 bytes, but .* describes 13 tokens"):
        open_tokens(prefix, verified=verified(num_tokens=13))


def test_opening_takes_memory_of_blocks_whatever_the_number_of_documents(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "_BLOCK_ITEMS", 1 << 14)
    prefix, count = str(folder / "many"), 1_000_000
    craft(folder / "many", np.ones(count, dtype=np.int64))
    tracemalloc.start()
    try:
        file = open_tokens(prefix)
        cfg = DataConfig(data_path=(prefix,), split="9,1", num_workers=0)
        build_data(cfg, vocab_size=1 << 20, seq_length=8, seed=1)
        assert file.document_starts.between(count - 3, count).tolist() == [
            count - 3,
            count - 2,
            count - 1,
        ]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * count, "an array of starts alone takes 8 bytes a document"
