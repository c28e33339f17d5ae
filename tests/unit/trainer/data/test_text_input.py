"""Read inputs as files, pipes and standard input, plain and compressed, and compare the lines."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron.trainer.data import jsonl
from megatron.trainer.data.jsonl import TextLines, parse_text, read_texts
from megatron.trainer.data.text_input import check_inputs
from megatron.trainer.errors import DataError

TEXTS = [f"{n} {random.Random(n).random()} \u00e4\u6f22\U0001f600" for n in range(3000)]
PLAIN = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def as_zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


HALF = len(PLAIN) // 2
SKIPPABLE = b"\x53\x2a\x4d\x18\x05\x00\x00\x00notes"
FORMS: dict[str, bytes] = {
    "plain": PLAIN,
    "windows line ends": PLAIN.replace(b"\n", b"\r\n"),
    "no last line end": PLAIN.removesuffix(b"\n"),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "gzip": gzip.compress(PLAIN),
    "gzip members": gzip.compress(PLAIN[:HALF]) + gzip.compress(PLAIN[HALF:]),
    "zstd": as_zstd(PLAIN),
    "zstd frames": as_zstd(PLAIN[:HALF]) + SKIPPABLE + as_zstd(PLAIN[HALF:]),
    "zstd, skippable first": SKIPPABLE + as_zstd(PLAIN),
}


def pipe_of(data: bytes, folder: Path) -> str:
    """Return a named pipe into which a thread writes `data` once."""
    path = folder / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as file:
            file.write(data)

    threading.Thread(target=write, daemon=True).start()
    return str(path)


def file_of(data: bytes, folder: Path) -> str:
    path = folder / "input"  # the bytes tell what it is, not the name
    path.write_bytes(data)
    return str(path)


@pytest.fixture(params=["file", "pipe", "standard input"])
def give(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes], str]:
    """Returns the path that stands for some bytes."""

    def standard_input(data: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return "-"

    if request.param == "standard input":
        return standard_input
    make = file_of if request.param == "file" else pipe_of
    return lambda data: make(data, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_texts(form: str, give: Callable[[bytes], str]) -> None:
    assert list(read_texts(TextLines(give(FORMS[form])), key="text")) == TEXTS


def test_blank_lines_are_counted_and_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    data = b'\n{"text": "a"}\n\n  \t\r\n{"text": "b"}\r\n{"text": "c"}\n\n'
    lines = TextLines(file_of(data, tmp_path))
    for _ in range(2):  # counted anew each time
        assert [(number, json.loads(line)["text"]) for number, line in lines] == [
            (2, "a"),
            (5, "b"),
            (6, "c"),
        ]
        assert lines.num_blank == 4


def test_a_pipe_that_is_read_again_is_copied(give: Callable[[bytes], str]) -> None:
    lines = TextLines(give(FORMS["gzip"]), is_reread=True)
    for _ in range(3):
        assert list(read_texts(lines, key="text")) == TEXTS


def test_a_pipe_is_not_read_twice_in_silence(tmp_path: Path) -> None:
    lines = TextLines(pipe_of(PLAIN, tmp_path))
    assert len(list(lines)) == len(TEXTS)
    with pytest.raises(DataError, match="is a pipe, which was read already"):
        list(lines)
    with pytest.raises(DataError, match="--input names - 2 times; a pipe can be read only once"):
        check_inputs(["-", "a", "-"])
    check_inputs(["a", "a", "-"])


@pytest.mark.parametrize("form", ["gzip", "gzip members", "zstd", "zstd frames"])
@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_cut_off_data_are_named_with_the_line(form: str, kept: float, tmp_path: Path) -> None:
    data = FORMS[form]
    path = file_of(data[: int(len(data) * kept)], tmp_path)
    seen = []
    with pytest.raises(DataError) as raised:
        for number, _ in TextLines(path):
            seen.append(number)
    assert f"{path}, line {len(seen) + 1}: cannot be read (" in str(raised.value)
    assert "damaged or cut off; restore the input" in str(raised.value)
    assert len(seen) < len(TEXTS)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_damaged_data_are_named(form: str, tmp_path: Path) -> None:
    data = bytearray(FORMS[form])
    for index in range(HALF // 4, HALF // 4 + 400):
        data[index] ^= 0x5A
    with pytest.raises(DataError, match=r"input, line \d+: cannot be read"):
        list(TextLines(file_of(bytes(data), tmp_path)))
    with pytest.raises(DataError, match=r"input, line 3001: cannot be read"):
        list(TextLines(file_of(FORMS[form] + b"rest of another file", tmp_path)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_compressed_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(DataError, match="is empty; a compressed file has some bytes"):
        list(TextLines(str(path)))
    path.write_bytes(PLAIN)  # decompressed by what fetched it
    assert len(list(TextLines(str(path)))) == len(TEXTS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[{"text": "a"}, {"text": "b"}]\n', "line 1: begins a JSON array"),
        (b'\n[\n{"text": "a"}\n]\n', "line 2: begins a JSON array"),
        (b'{\n"text": "a"\n}\n', "line 1: not JSON .* spans several lines; .* jq -c \\."),
        ('{"text": "a"}\n'.encode("utf-16"), "is in UTF-16 or UTF-32, as its first bytes ff fe"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "is in UTF-16 or UTF-32"),
        ('{"text": "a"}\n'.encode("utf-32"), "is in UTF-16 or UTF-32"),
        (gzip.compress('{"text": "a"}\n'.encode("utf-16"), mtime=0), "is in UTF-16 or UTF-32"),
        (bz2.compress(PLAIN), "is a bzip2 file; .* `bzip2 -dc`"),
        (lzma.compress(PLAIN), "is an xz file; .* `xz -dc`"),
        (b"PK\x03\x04 and more", "is a zip archive; .*; unpack it"),
        (b"PAR1 and more", "is a Parquet file; .* write its rows as JSON Lines"),
    ],
)
def test_other_formats_are_named(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        list(read_texts(TextLines(file_of(data, tmp_path)), key="text"))


def test_a_huge_array_in_one_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 100)
    with pytest.raises(DataError, match="line 1: begins a JSON array"):
        list(TextLines(file_of(b"[" + b"1, " * 100, tmp_path)))


@pytest.mark.parametrize("compress", [gzip.compress, as_zstd])
def test_what_a_small_file_becomes_is_bounded(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 1 << 20)
    data = compress(b"{" + b" " * (1 << 26))
    assert len(data) < 1 << 19
    lines = TextLines(file_of(data, tmp_path))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="line 1: has more than 1,048,576 bytes"):
            list(lines)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 25  # half of what the file becomes


def test_zstd_needs_its_package_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="needs the package zstandard; pip install zstandard"):
        list(TextLines(file_of(FORMS["zstd"], tmp_path)))


def test_a_line_names_its_input(give: Callable[[bytes], str]) -> None:
    path = give(b'{"text": "a"}\n\n{"text": 7}\n')
    lines = TextLines(path)
    name = "standard input" if path == "-" else path
    with pytest.raises(DataError, match=f"^{name}, line 3: 'text' is a int"):
        for number, line in lines:
            parse_text(line, key="text", path=lines.name, number=number)
