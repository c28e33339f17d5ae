"""Give preprocessing hostile input and bad places for output: an error with remedy, or a count."""

import math
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron.trainer.data import jsonl, text_input
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.tokenizer import Tokenizer
from moe_app.data import text_chunks, token_work
from moe_app.data.text_inputs import cut_shard, find_inputs
from tests.unit.app.data.token_files import GOOD, files

BAD = [
    b'{"text": "a\0b"}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": 7}',
    b"{}",
    b"not JSON",
    b'{"text": "spells <unk>"}x',
]


def test_output_in_a_folder_that_is_read_is_refused(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out").mkdir()
    for prefix in (tmp_path / "corpus", tmp_path / "out" / "corpus"):
        assert run(prefix, "--input", str(tmp_path)) == 2
        assert "whose files are read; the output must be outside" in capsys.readouterr().err
    assert run(tmp_path / "corpus", "--input", str(tmp_path / "in.jsonl")) == 0


def test_empty_file_among_others_is_in_no_shard(tmp_path: Path) -> None:
    for name, content in (("a", GOOD), ("b", b""), ("c", GOOD)):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    inputs = find_inputs([str(tmp_path / f"{name}.jsonl") for name in "abc"])
    cuts = [cut_shard(inputs, index=index, count=2) for index in range(2)]
    assert [[each.source for each in cut] for cut in cuts] == [[0], [2]]


@pytest.mark.parametrize("line", BAD)
def test_line_that_holds_no_document_is_named(
    line: bytes, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    assert run(tmp_path / "out", "--input", str(source)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {source}, line 3: ")
    assert message.endswith(" (--max-bad-lines is 0: raise it to skip and count such lines)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_bad_lines_are_skipped_counted_and_located_in_any_shard(
    suffix: str,
    tmp_path: Path,
    run: Callable[..., int],
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 1000)
    lines = [GOOD] * 300
    places = {20: BAD[0], 140: b'{"text": "%s"}' % (b"long " * 9000), 280: BAD[2], 299: BAD[1]}
    for place, line in places.items():
        lines[place - 1] = line
    data = b"\n".join(lines)
    source = tmp_path / f"in{suffix}"
    source.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
    flags = ["--input", str(source)]
    assert run(tmp_path / "out", *flags, "--max-bad-lines", "3") == 2
    assert f"error: {source}, line 299: not JSON" in capsys.readouterr().err
    flags += ["--max-bad-lines", "4"]
    assert run(tmp_path / "out", *flags) == 0
    shown = capsys.readouterr()
    found = re.findall(r"^skipped: .*, line (\d+): ", shown.err, re.MULTILINE)
    assert [int(each) for each in found] == list(places)
    assert "296 documents (0 empty ones and 4 bad lines skipped)" in shown.out
    expected = tokenizer.encode_document("the fox") * 296
    assert open_tokens(str(tmp_path / "out_text_document")).tokens.tolist() == expected
    cut = ("--num-shards", "2", "--shard-index")
    assert all(run(tmp_path / "cut", *flags, *cut, index) == 0 for index in "01")
    found = re.findall(r"^skipped: .*, line (\d+): ", capsys.readouterr().err, re.MULTILINE)
    assert [int(each) for each in found] == list(places)
    assert run(tmp_path / "cut", "--merge", "--num-shards", "2") == 0
    assert files(tmp_path / "cut") == files(tmp_path / "out")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_line_of_a_gigabyte_is_passed_over_in_bounded_memory(
    tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_chunks, "_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 1 << 20)
    source = tmp_path / "in.jsonl"
    with source.open("wb") as file:
        file.write(GOOD + b'\n{"text": "')
        file.seek(1 << 30, os.SEEK_CUR)  # a hole, which takes no disk space
        file.write(b'"}\n' + GOOD)
    before = peak_bytes()
    assert run(tmp_path / "out", "--input", str(source), "--max-bad-lines", "1") == 0
    assert peak_bytes() - before < 64 << 20
    assert open_tokens(str(tmp_path / "out_text_document")).num_documents == 2


@pytest.mark.parametrize("line", [b"\n", b"\0", GOOD + b"\n"])
def test_bomb_is_refused_after_a_bounded_part_of_it(
    line: bytes,
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_chunks, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(text_chunks, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(text_input, "FREE_BYTES", 1 << 18)
    monkeypatch.setattr(token_work, "_COMMIT_SECONDS", math.inf)  # or its draft would stay
    source = tmp_path / "in.jsonl.zst"
    source.write_bytes(zstandard.compress(line * (20_000_000 // len(line))))
    assert run(tmp_path / "out", "--input", str(source)) == 2
    message = capsys.readouterr().err
    assert re.search(r"in.jsonl.zst.* unpacks to more than \d\d\d,\d{3}; ", message)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl.zst"]


def test_folder_is_read_by_names_and_never_left(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "named", "--input", *corpus) == 0
    folder = Path(corpus[0]).parent
    assert run(tmp_path / "folder", "--input", str(folder)) == 0
    assert run(tmp_path / "pattern", "--input", f"{folder}/*.jsonl*") == 0
    assert files(tmp_path / "folder") == files(tmp_path / "named") == files(tmp_path / "pattern")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").symlink_to(corpus[0])
    assert run(tmp_path / "out", "--input", str(tmp_path / "in")) == 2
    assert f"a.jsonl is a link to {corpus[0]}, out of {tmp_path}/in; " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_full_disk_loses_nothing_that_was_committed(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_work, "_COMMIT_SECONDS", 0.0)
    flags = ("--input", *corpus)
    assert run(tmp_path / "whole", *flags) == 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1, 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
        try:
            assert run(tmp_path / "out", *flags) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        message = capsys.readouterr().err
        assert f"error: {tmp_path}/out_text_document.part cannot be written: File too" in message
        assert "; make room, or choose another prefix" in message
        assert ("documents are kept: start again to go on" in message) == (most > 1)
        assert (tmp_path / "out_text_document.part").exists() == (most > 1)
    assert run(tmp_path / "out", *flags) == 0
    assert "out_text_document: going on after " in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_output_that_cannot_be_written_is_named(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert run(tmp_path / "file/out", "--input", *corpus) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path}/file/out_text_document")
    assert "cannot be" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
