"""Token files: what the writer writes is what mcore reads, and damage never passes."""

import re
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.trainer.data.index_file import MAGIC
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.writer import TokenFileWriter, token_dtype
from megatron.trainer.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
REBUILD = "write it again with tools/preprocess_data.py or copy it again"
IDX_BYTES = 34 + 12 * 3 + 8 * 4


def write(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 100) -> str:
    with TokenFileWriter(str(prefix), vocab_size=vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish()
    return str(prefix)


def craft(
    prefix: Path,
    *,
    magic: bytes = MAGIC,
    version: int = 1,
    code: int = 8,
    lengths: Sequence[int] = (3, 1, 4),
    offsets: Sequence[int] = (0, 6, 8),
    bounds: Sequence[int] = (0, 1, 2, 3),
    num_bytes: int = 16,
) -> str:
    """Write a token file field by field; the defaults are valid and say what DOCUMENTS says."""
    header = struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(bounds))
    body = np.array(lengths, "<i4").tobytes() + np.array([*offsets, *bounds], "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(header + body)
    Path(f"{prefix}.bin").write_bytes(bytes(num_bytes))
    return str(prefix)


def test_written_tokens_and_document_starts_read_back(tmp_path: Path) -> None:
    file = open_tokens(write(tmp_path / "a", DOCUMENTS), vocab_size=13)
    assert file.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert file.document_starts[:].tolist() == [0, 3, 4]
    assert (file.num_tokens, file.num_documents, file.dtype) == (8, 3, np.uint16)


def test_map_is_read_only(tmp_path: Path) -> None:
    file = open_tokens(write(tmp_path / "a", DOCUMENTS))
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 200_000])
def test_files_are_byte_for_byte_those_of_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and megatron-core say at import
        import torch
        from megatron.core.datasets.indexed_dataset import (
            DType,
            IndexedDataset,
            IndexedDatasetBuilder,
        )
    documents = [*DOCUMENTS, [vocab_size - 1]]
    ours, theirs = write(tmp_path / "a", documents, vocab_size), str(tmp_path / "b")
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{theirs}.idx")

    for suffix in (".bin", ".idx"):
        assert Path(ours + suffix).read_bytes() == Path(theirs + suffix).read_bytes()
    read = IndexedDataset(ours)
    assert [read[i].tolist() for i in range(len(read))] == documents
    assert open_tokens(theirs).tokens.tolist() == [id_ for ids in documents for id_ in ids]


def test_a_document_of_several_sequences_starts_where_its_first_one_does(tmp_path: Path) -> None:
    file = open_tokens(craft(tmp_path / "a", bounds=(0, 2, 2, 3)))
    assert file.document_starts[:].tolist() == [0, 4, 4]


def test_dtype_leaves_uint16_where_megatron_core_does() -> None:
    assert [token_dtype(v) for v in (65499, 65500)] == [np.uint16, np.int32]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(prefix + suffix).unlink()
    message = (
        f"{prefix}{suffix} does not exist or is not a file; the prefix {prefix!r} must name two"
        " files, PREFIX.bin and PREFIX.idx; check the path, and give it without .bin or .idx"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        open_tokens(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(prefix + suffix).write_bytes(b"")
    message = f"{prefix}{suffix} has 0 bytes; a token file must hold at least one token; {REBUILD}"
    with pytest.raises(DataError, match=re.escape(message)):
        open_tokens(prefix)


def shorten(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"\0"


@pytest.mark.parametrize(("damage", "size"), [(shorten, 15), (lengthen, 17)])
def test_bin_one_byte_off_is_caught(
    tmp_path: Path, damage: Callable[[bytes], bytes], size: int
) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    path = Path(f"{prefix}.bin")
    path.write_bytes(damage(path.read_bytes()))
    message = (
        f"{prefix}.bin has {size} bytes, but {prefix}.idx describes 8 tokens of 2 bytes = 16"
        f" bytes; both must agree; {REBUILD}"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        open_tokens(prefix)


@pytest.mark.parametrize(("damage", "size"), [(shorten, IDX_BYTES - 1), (lengthen, IDX_BYTES + 1)])
def test_idx_one_byte_off_is_caught(
    tmp_path: Path, damage: Callable[[bytes], bytes], size: int
) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(damage(path.read_bytes()))
    message = (
        f"{prefix}.idx has {size} bytes, but 3 sequences and 4 document bounds take {IDX_BYTES}"
        f" bytes; both must agree; {REBUILD}"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        open_tokens(prefix)


def test_idx_shorter_than_its_header_is_caught(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    Path(f"{prefix}.idx").write_bytes(MAGIC)
    message = f"{prefix}.idx has 9 bytes, but the header alone has 34; {REBUILD}"
    with pytest.raises(DataError, match=re.escape(message)):
        open_tokens(prefix)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"magic": b"TNTIDX\0\0\0"},
            r".idx begins with b'TNTIDX\x00\x00\x00', but an index begins with"
            r" b'MMIDIDX\x00\x00'; ",
        ),
        ({"version": 2}, ".idx has version 2; only 1 can be read; "),
        (
            {"code": 6},
            ".idx has dtype code 6; tokens must be one of 1 (uint8), 2 (int8), 3 (int16),"
            " 4 (int32), 5 (int64), 8 (uint16); ",
        ),
        (
            {"lengths": (3, -1, 4), "offsets": (0, 6, 4)},
            ".idx: sequence 1 has length -1; lengths must be >= 0; ",
        ),
        (
            {"offsets": (0, 6, 10)},
            ".idx: sequence 2 starts at byte 10, but the lengths before it end at byte 8; both"
            " must agree; ",
        ),
        (
            {"bounds": (0, 1, 2)},
            ".idx: document bounds go from 0 to 2; they must go from 0 to the number of sequences,"
            " 3; ",
        ),
        (
            {"bounds": ()},
            ".idx: document bounds go from None to None; they must go from 0 to the number of"
            " sequences, 3; ",
        ),
        (
            {"bounds": (0, 2, 1, 3)},
            ".idx: document 1 goes from sequence 2 to 1; document bounds must not fall; ",
        ),
    ],
)
def test_inconsistent_idx_is_caught(tmp_path: Path, fields: dict, message: str) -> None:
    prefix = craft(tmp_path / "a", **fields)
    with pytest.raises(DataError, match=f"^{re.escape(prefix + message + REBUILD)}$"):
        open_tokens(prefix)


def test_absurd_counts_in_the_header_are_a_size_mismatch_not_a_huge_allocation(
    tmp_path: Path,
) -> None:
    prefix = craft(tmp_path / "a")
    path = Path(f"{prefix}.idx")
    data = path.read_bytes()
    path.write_bytes(data[:18] + struct.pack("<QQ", 2**63, 2**63) + data[34:])
    with pytest.raises(DataError, match=f"{2**63} sequences and {2**63} document bounds take"):
        open_tokens(prefix)


@pytest.mark.parametrize(
    ("dtype", "code", "id_"), [("<u2", 8, 40), ("<i4", 4, 40), ("<i4", 4, -1), ("<i8", 5, 2**40)]
)
def test_token_outside_the_vocabulary_is_named(
    tmp_path: Path, dtype: str, code: int, id_: int
) -> None:
    size = np.dtype(dtype).itemsize
    prefix = craft(tmp_path / "a", code=code, offsets=(0, 3 * size, 4 * size))
    Path(f"{prefix}.bin").write_bytes(np.array([0, 39, 1, 2, 3, id_, 4, id_], dtype).tobytes())
    message = (
        f"{prefix}.bin: token 5 has id {id_}, but the vocabulary has 40 ids; ids must be 0 to 39;"
        " preprocess the data with this model's tokenizer or raise --vocab-size"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        open_tokens(prefix, vocab_size=40)


def test_vocabulary_check_reaches_past_the_first_piece_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.trainer.data.indexed._SCAN_TOKENS", 3)
    prefix = write(tmp_path / "a", DOCUMENTS)
    open_tokens(prefix, vocab_size=13)
    with pytest.raises(DataError, match="token 7 has id 12, but the vocabulary has 12 ids"):
        open_tokens(prefix, vocab_size=12)


def test_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="disk on fire"),
        TokenFileWriter(str(tmp_path / "a"), vocab_size=10) as writer,
    ):
        writer.add_document([1])
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_writer_keeps_the_old_file_when_the_new_one_does_not_verify(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    with (
        pytest.raises(DataError, match="token 0 has id 10, but the vocabulary has 10 ids"),
        TokenFileWriter(prefix, vocab_size=10) as writer,
    ):
        writer.add_document([10])
        writer.finish()
    assert open_tokens(prefix).num_tokens == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_writer_refuses_a_document_longer_than_the_format_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.trainer.data.writer._LARGEST_LENGTH", 2)
    message = (
        "document 0 has 3 tokens; the format stores lengths as int32, at most 2; split the document"
    )
    with (
        TokenFileWriter(str(tmp_path / "a"), vocab_size=10) as writer,
        pytest.raises(DataError, match=f"^{re.escape(message)}$"),
    ):
        writer.add_document([1, 2, 3])


def test_writer_renames_the_index_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)

    def die(source: str, target: str) -> None:
        assert target == f"{prefix}.bin"
        assert not Path(f"{prefix}.idx").exists()
        raise OSError("killed")

    monkeypatch.setattr("megatron.trainer.data.writer.os.replace", die)
    with (
        pytest.raises(OSError, match="killed"),
        TokenFileWriter(prefix, vocab_size=100) as writer,
    ):
        writer.add_document([1])
        writer.finish()
    with pytest.raises(DataError, match=re.escape(f"{prefix}.idx does not exist")):
        open_tokens(prefix)


def test_a_huge_file_is_not_read_through_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = str(tmp_path / "a")
    with TokenFileWriter(prefix, vocab_size=100) as writer:
        writer.add_document([1, 2, 99])
        writer.finish()
    with pytest.raises(DataError, match="token 2 has id 99"):
        open_tokens(prefix, vocab_size=50)
    monkeypatch.setattr("megatron.trainer.data.indexed._FULL_SCAN_TOKENS", 2)
    assert open_tokens(prefix, vocab_size=50).num_tokens == 3
