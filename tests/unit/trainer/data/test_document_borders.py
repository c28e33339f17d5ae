"""Where documents end within windows, and what is refused because it would not be kept apart."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data import document_borders
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.build import DataBundle, build_data
from megatron.trainer.data.document_borders import check_ends, look_at_ends
from megatron.trainer.data.source import MockSource, WindowSource, read_batch
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError

RULE = DocumentRule(eod=None, reset_position_ids=True, reset_attention_mask=True)
EOD = 0
BATCH: dict[str, int] = {
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
}


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    with TokenFileWriter(str(prefix), vocab_size=5000) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish()
    return str(prefix)


def build(*, documents: DocumentRule | None = RULE, **fields: Any) -> DataBundle:
    return build_data(
        DataConfig(**fields), vocab_size=5000, seq_length=4, seed=1, documents=documents
    )


def source_of(prefix: str, **fields: Any) -> WindowSource:
    (source,) = build(data_path=(f"web={prefix}",), **fields).train.sources
    assert isinstance(source, WindowSource)
    return source


def numbered(lengths: Sequence[int], first: int = 0) -> list[range]:
    """Documents whose tokens are their own positions."""
    ends = list(itertools.accumulate(lengths, initial=first))
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def starts_by_hand(tokens: Sequence[int], lengths: Sequence[int], first: int = 0) -> list[bool]:
    """Whether a document begins at each of these tokens, the first aside."""
    begins = {ids[0] for ids in numbered(lengths, first) if len(ids)}
    return [False, *(token in begins for token in tokens[1:])]


@given(lengths=st.lists(st.integers(0, 7), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_windows_say_where_the_index_ends_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    """Empty documents, windows that begin inside one, and those of a held-back part included."""
    lengths = [9, *lengths, 9]
    prefix = write(tmp_path_factory.mktemp("lengths") / "a", numbered(lengths))
    bundle = build(data_path=(prefix,), split="1,1")
    for source in bundle.sources().values():
        assert source.num_windows
        for n in range(source.num_windows):
            batch = read_batch([(source, n)])
            assert batch.document_starts is not None
            tokens = batch.tokens[0].tolist()
            assert batch.document_starts[0].tolist() == starts_by_hand(tokens, lengths)


def test_every_source_of_a_blend_says_it_in_training_and_in_validation(tmp_path: Path) -> None:
    lengths = {"a": [3, 9, 5, 14], "b": [6, 6, 1, 30]}
    prefixes = {
        "a": write(tmp_path / "a", numbered(lengths["a"])),
        "b": write(tmp_path / "b", numbered(lengths["b"], 1000)),
    }
    bundle = build(
        data_path=("1", prefixes["a"], "1", prefixes["b"]),
        valid_data_path=(f"held={prefixes['b']}",),
    )
    batches = bundle.train.next_global_batch(**BATCH)
    batches += next(bundle.validation["held"].batches(1, **BATCH))
    seen = set()
    for batch in batches:
        assert batch.document_starts is not None
        for tokens, found in zip(
            batch.tokens.tolist(), batch.document_starts.tolist(), strict=True
        ):
            name, first = ("a", 0) if tokens[0] < 1000 else ("b", 1000)
            assert found == starts_by_hand(tokens, lengths[name], first)
            seen.add((name, any(found)))
    assert seen == {("a", True), ("b", True), ("a", False), ("b", False)}


def test_random_tokens_begin_a_document_after_the_id_that_ends_one() -> None:
    source = MockSource(vocab_size=3, seq_length=50, seed=1, eod=EOD)
    batch = read_batch([(source, 4)])
    assert batch.document_starts is not None
    tokens = batch.tokens[0].tolist()
    by_hand = [False, *(before == EOD for before in tokens[:-1])]
    assert batch.document_starts[0].tolist() == by_hand
    assert any(by_hand)


def test_without_a_reset_windows_do_not_say_it(tmp_path: Path) -> None:
    bundle = build(data_path=(write(tmp_path / "a", numbered([20, 20])),), documents=None)
    assert bundle.train.next_global_batch(**BATCH)[0].document_starts is None


def ended(count: int, *, inside: bool = False) -> list[list[int]]:
    """Documents that end with EOD; every second one holds it before its end too, if asked for."""
    return [[7, EOD if inside and n % 2 else 8, 10 + n % 3, EOD] for n in range(count)]


def open_ended(count: int) -> list[list[int]]:
    return [[7, 8, 9, 10 + n % 3] for n in range(count)]


def check(
    source: WindowSource, eod: int | None, *, given: bool = True, training: bool = True
) -> list[str]:
    return check_ends(source, eod=eod, is_given=given, is_training=training)


def test_id_that_begins_documents_too_is_not_inside_them(tmp_path: Path) -> None:
    """Tokenizers whose beginning and end of a text are one token, with and without it appended."""
    both = [[EOD, *ids] for ids in ended(30)]
    assert check(source_of(write(tmp_path / "a", both)), EOD) == []
    (note,) = check(source_of(write(tmp_path / "b", [ids[:-1] for ids in both])), EOD, given=False)
    assert "0 end with it and 0 hold it before their end" in note


@pytest.mark.parametrize("given", [True, False])
def test_documents_that_end_with_the_id_and_nowhere_hold_it_need_no_word(
    tmp_path: Path, given: bool
) -> None:
    assert check(source_of(write(tmp_path / "a", ended(30))), EOD, given=given) == []


def test_documents_without_an_id_need_none(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "a", open_ended(30)))
    assert check(source, None) == []
    assert check(source, EOD, given=False) == [
        f"web: the tokenizer ends documents with id 0; of 30 documents looked at, of 30 in"
        f" {tmp_path}/a.idx, 0 end with it and 0 hold it before their end; they are kept apart"
        " where the index says that they end"
    ]


@pytest.mark.parametrize(
    ("documents", "eod", "said"),
    [
        (open_ended(30), EOD, "0 end with it and 0 hold it before their end (the most frequent"),
        (open_ended(30), 8, "0 end with it and 30 hold it before their end (the most frequent"),
        (ended(30), 8, "0 end with it and 30 hold it before their end (the most frequent"),
        (open_ended(30), 10, "10 end with it and 0 hold it before their end (the most frequent"),
        (ended(30, inside=True), EOD, "30 end with it and 15 hold it before their end (the most"),
    ],
)
def test_given_id_that_is_not_every_documents_last_and_only_there_is_refused(
    tmp_path: Path, documents: list[list[int]], eod: int, said: str
) -> None:
    prefix = write(tmp_path / "a", documents)
    message = (
        f"--eod-token-id {eod} is not what ends documents in source 'web': of 30 documents looked"
        f" at, of 30 in {prefix}.idx, {said}"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}") as raised:
        check(source_of(prefix), eod)
    last = documents[0][-1]
    count = sum(ids[-1] == last for ids in documents)
    assert str(raised.value).endswith(
        f"(the most frequent last token is {last}, {count} times); it must be the last token of"
        " every document and stand nowhere else; give the id that is, or none: documents are kept"
        " apart where the index says that they end"
    )


def test_tokenizers_id_inside_documents_that_end_otherwise_is_refused(tmp_path: Path) -> None:
    """Texts packed before they were indexed, or ids of another tokenizer."""
    prefix = write(tmp_path / "a", open_ended(30))
    message = (
        "the tokenizer ends documents with id 8, which contradicts the index of source 'web': of 30"
        f" documents looked at, of 30 in {prefix}.idx, 0 end with it and 30 hold it before their"
        " end; documents are kept apart where the index says that they end, and must end there in"
        " the text, too; write the file again with one document a line of input, or give the"
        " --tokenizer-model that it was written with"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check(source_of(prefix), 8, given=False)


def test_tokenizers_id_inside_documents_that_it_ends_leaves_them_whole(tmp_path: Path) -> None:
    """A chat's turns end with it as its documents do."""
    (note,) = check(source_of(write(tmp_path / "a", ended(30, inside=True))), EOD, given=False)
    assert "30 end with it and 15 hold it before their end; they are kept apart where the" in note


def test_file_of_one_document_is_refused_in_training_and_said_in_validation(
    tmp_path: Path,
) -> None:
    text = [token for ids in open_ended(30) for token in ids]
    source = source_of(write(tmp_path / "a", [text, []]))
    message = (
        f"source 'web' is one document of 120 tokens by {tmp_path}/a.idx, so --reset-position-ids"
        " and --reset-attention-mask would change nothing in it; they keep documents apart where"
        " the index says that they end; write it again with one document a line of input, leave it"
        " out, or drop the two flags"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check(source, None)
    assert check(source, None, training=False) == [
        "web is one document, with nothing to keep apart"
    ]
    # A validation set whose texts were run together before they were indexed.
    with pytest.raises(DataError, match="contradicts the index of source 'web': of 1 documents"):
        check(source, 8, given=False, training=False)


def test_training_part_of_one_document_beside_a_held_back_one_is_said(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "a", [range(1, 20), range(1, 20)]), split="1,1")
    assert check(source, None) == ["web is one document, with nothing to keep apart"]


def test_ends_are_counted_in_a_sample_that_spans_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_borders, "_NUM_SAMPLED", 11)
    monkeypatch.setattr(document_borders, "_TAIL_TOKENS", 3)
    documents = [[EOD, 5, 6, 7, EOD if n < 50 else 9] for n in range(101)]
    found = look_at_ends(source_of(write(tmp_path / "a", documents)), EOD)
    chosen = np.linspace(0, 100, 11).astype(int)
    assert found.num_sampled == 11
    assert found.num_ended == int((chosen < 50).sum())
    assert found.num_inside == 0, "what is before the last tokens is not read"
    assert found.common == (9, 6)
