"""Check that untrusted token files, tokenizers and texts give exact data or a bounded error."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.trainer.data import jsonl, tokenizer_files
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.tokenizer import HFTokenizer, SentencePieceTokenizer
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError
from moe_app.data import preprocess_data
from tests.paths import REPO

MIB = 1 << 20
QUICK = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(params=[100, 70_000], ids=["uint16", "int32"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    with TokenFileWriter(str(tmp_path / "a"), vocab_size=request.param) as writer:
        for document in ([5, 6, 7], [8], [9, 10, 11, 12], list(range(30))):
            writer.add_document(document)
        writer.finish()
    return str(tmp_path / "a")


@QUICK
@given(data=st.data())
def test_corrupt_index_is_refused_or_changes_no_token(data: st.DataObject, prefix: str) -> None:
    """Check that lengths, offsets and sizes agree; document starts have no redundancy."""
    path = Path(f"{prefix}.idx")
    original, expected = path.read_bytes(), open_tokens(prefix).tokens.tolist()
    corrupted = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        corrupted[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(corrupted)
    try:
        found = open_tokens(prefix)
    except DataError:
        return
    finally:
        path.write_bytes(original)
    assert found.tokens.tolist() == expected
    starts = found.document_starts[:]
    assert 0 <= starts.min() and starts.max() <= len(expected)
    assert (np.diff(starts) >= 0).all()


@QUICK
@given(data=st.data())
def test_corrupt_token_stays_within_the_vocabulary(data: st.DataObject, prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    original = path.read_bytes()
    corrupted = bytearray(original)
    corrupted[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(corrupted)
    try:
        found = open_tokens(prefix, vocab_size=31).tokens
        assert 0 <= found.min() and found.max() < 31
    except DataError as error:
        assert "but the vocabulary has 31 ids" in str(error)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_file_is_refused(suffix: str, prefix: str) -> None:
    path = Path(prefix + suffix)
    original = path.read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(DataError):
            open_tokens(prefix)


def test_huge_counts_are_checked_against_the_file_size(prefix: str) -> None:
    path = Path(f"{prefix}.idx")
    original = path.read_bytes()
    before = peak_bytes()
    for count in (1 << 31, 1 << 40, (1 << 64) - 1, 1 << 63):
        for at in (18, 26):
            path.write_bytes(original[:at] + struct.pack("<Q", count) + original[at + 8 :])
            with pytest.raises(DataError, match="both must agree"):
                open_tokens(prefix)
    assert peak_bytes() - before < 32 * MIB


BPE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 0,
            "content": "<|endoftext|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"]],
    },
}


def bpe(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps({**BPE, **changes}))
    return str(path)


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**BPE["model"], **changes}}


TEMPLATE = {"SpecialToken": {"id": "X", "type_id": 0}}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(model(vocab={"<|endoftext|>": 0, "a": 1 << 32}), id="id beyond 32 bits"),
        pytest.param(model(merges=[["a", "zz"]]), id="merge of nothing"),
        pytest.param(model(type="Unigram", vocab=[["a", 0.0]], unk_id=5), id="unknown id"),
        pytest.param(
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////AAAA"}},
            id="charsmap, on which the library panics",
        ),
        pytest.param(
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Removed",
                    "invert": False,
                }
            },
            id="half a regular expression",
        ),
        pytest.param({"model": None}, id="no model"),
        pytest.param({"added_tokens": "x"}, id="no list of tokens"),
    ],
)
def test_hostile_tokenizer_is_refused(
    changes: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = bpe(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(DataError, match=f"^tokenizer {re.escape(path)} is not a tokenizers JSON"):
        HFTokenizer(path)
    capfd.readouterr()  # Rust's panic message


def test_ids_beyond_int32_are_refused(tmp_path: Path) -> None:
    path = bpe(tmp_path / "t", **model(vocab={"<|endoftext|>": 0, "a": (1 << 32) - 1}, merges=[]))
    with pytest.raises(DataError, match="has the id 4294967295; ids must be at most 2147483647"):
        HFTokenizer(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"model":' * 10_000, b"", b"\xff" * 100])
@pytest.mark.parametrize("kind", [HFTokenizer, SentencePieceTokenizer])
def test_bytes_that_are_no_tokenizer_are_refused(
    content: bytes, kind: type[HFTokenizer | SentencePieceTokenizer], tmp_path: Path
) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError):
        kind(str(tmp_path / "t"))


def field(number: int, wire_type: int, content: bytes) -> bytes:
    """Encode a field of a protocol buffer."""
    length = varint(len(content)) if wire_type == 2 else b""
    return varint(number << 3 | wire_type) + length + content


def varint(value: int) -> bytes:
    low = [(value >> shift & 0x7F) | 0x80 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*low[:-1], low[-1] & 0x7F])


def piece(text: bytes, kind: int = 1) -> bytes:
    record = field(1, 2, text) + field(2, 5, struct.pack("<f", 0.0)) + field(3, 0, varint(kind))
    return field(1, 2, record)


PIECES = piece(b"<unk>", 2) + piece(b"<s>", 3) + piece(b"</s>", 3) + piece(b"a") + piece(b"b")


def charsmap(first: int, others: int) -> bytes:
    """Encode a normalization table whose trie points out of bounds."""
    units = struct.pack("<256I", first, *[others] * 255)
    return field(3, 2, field(2, 2, struct.pack("<I", len(units)) + units + b"\0abc\0"))


def test_handmade_sentencepiece_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(PIECES)
    assert SentencePieceTokenizer(str(tmp_path / "m")).vocab_size == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(PIECES + piece(b"a" * 200_000), "too long", id="issue 1263"),
        pytest.param(PIECES + piece(b"a\0b"), "null character", id="pull request 1207"),
        pytest.param(
            PIECES + charsmap(0x80000000 | 0x1FFFFF << 10, 0), "charsmap", id="issue 1269"
        ),
        pytest.param(PIECES + charsmap(0x1FFFFF << 10, 0xFFFFFFFF), "charsmap", id="far leaf"),
        pytest.param(PIECES[:-3], "SentencePiece", id="cut"),
        pytest.param(piece(b"a") * 3, "SentencePiece", id="no unknown piece"),
    ],
)
def test_models_that_crashed_older_sentencepiece_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(DataError, match=message):
        SentencePieceTokenizer(str(tmp_path / "m"))


FUZZ = """
import random, sys
from pathlib import Path
from megatron.trainer.data.tokenizer import HFTokenizer, SentencePieceTokenizer
from megatron.trainer.errors import DataError
kind = {"HF": HFTokenizer, "SP": SentencePieceTokenizer}[sys.argv[1]]
source, target, refused = Path(sys.argv[2]).read_bytes(), sys.argv[3], 0
draw = random.Random(int(sys.argv[4]))
for _ in range(int(sys.argv[5])):
    content = bytearray(source)
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    Path(target).write_bytes(content[: draw.choice((len(content), draw.randrange(len(content))))])
    try:
        ids = kind(target).encode("def main(): return 12 ab \\u00e9")
        assert all(0 <= each < 1 << 31 for each in ids)
    except DataError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("kind", ["HF", "SP"])
def test_corrupt_tokenizer_does_not_crash(kind: str, tmp_path: Path) -> None:
    """Run in a separate process, because a memory fault would end it."""
    source = tmp_path / "source"
    source.write_bytes(json.dumps(BPE).encode() if kind == "HF" else PIECES)
    command = [sys.executable, "-c", FUZZ, kind, str(source), str(tmp_path / "t"), "7", "800"]
    done = subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, "RUST_BACKTRACE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 200 < int(done.stdout) < 800


def test_tokenizer_of_any_size_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "MOST_BYTES", 1 << 20)
    with (tmp_path / "m").open("wb") as file:
        file.truncate(1 << 40)  # sparse; takes no disk space
    before = peak_bytes()
    for kind in (HFTokenizer, SentencePieceTokenizer):
        with pytest.raises(DataError, match="it has more than 1,048,576 bytes"):
            kind(str(tmp_path / "m"))
    assert peak_bytes() - before < 16 * MIB


def test_line_of_any_length_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 1 << 20)
    lines = tmp_path / "lines.jsonl"
    with lines.open("wb") as file:
        file.write(b'{"text": "ab"}\n')
        file.truncate(1 << 40)
    before = peak_bytes()
    flags = [
        "--input",
        lines,
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "HFTokenizer",
    ]
    flags += ["--tokenizer-model", bpe(tmp_path / "tokenizer.json")]
    assert preprocess_data.main([str(flag) for flag in flags]) == 2
    stderr = capsys.readouterr().err
    assert f"error: {lines}, line 2: has more than 1,048,576 bytes" in stderr
    assert peak_bytes() - before < 64 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.jsonl", "tokenizer.json"]


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b"\xff\xfe", b"{}"],
)
def test_hostile_line_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b'{"text": "ab"}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2"):
        list(jsonl.read_texts(jsonl.TextLines(str(tmp_path / "l")), key="text"))
