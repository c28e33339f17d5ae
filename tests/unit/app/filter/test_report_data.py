"""The report counts what was put into the data, source by source."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.data.writer import TokenFileWriter
from moe_app.filter import data_counts, filter_data
from moe_app.filter.data_counts import extension_of
from moe_app.filter.report_data import main
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

TEXTS: list[dict[str, Any]] = [
    {"text": "a b", "path": "src/x.py"},
    {"text": "é", "meta": {"max_stars_repo_path": "y.RS"}},
    {"text": "a b", "path": "z.py"},
    {"text": "", "path": "Makefile"},
    {"text": "<script>alert(1)</script>"},
    {"text": "a b"},
]


def write_texts(path: Path, *, bad: str = "") -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in TEXTS) + bad)
    return str(path)


def report(folder: Path, *flags: str) -> dict[str, dict[str, Any]]:
    assert main([*flags, "--output", str(folder / "out")]) == 0
    found = json.loads((folder / "out" / "report.json").read_text())
    return {Path(each["source"]).name: each for each in found["sources"]}


def test_every_source_is_counted_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TokenFileWriter(str(tmp_path / "tokens"), vocab_size=100) as writer:
        for ids in ([1, 2, 3], [4], [1, 2, 3], [], [9] * 8, []):
            writer.add_document(ids)
        writer.finish()
    texts = write_texts(tmp_path / "<b>.jsonl")
    found = report(tmp_path, "--token-file", str(tmp_path / "tokens"), "--input", texts)
    tokens, text = found["tokens"], found["<b>.jsonl"]
    counted = ("documents", "empty", "duplicates", "tokens", "text_bytes")
    assert [tokens[key] for key in counted] == [6, 2, 1, 15, None]
    sizes = [len(each["text"].encode()) for each in TEXTS]
    assert [text[key] for key in counted] == [6, 1, 2, None, sum(sizes)]
    assert tokens["lengths"] == [
        {"from": 0, "to": 0, "documents": 2},
        {"from": 1, "to": 1, "documents": 1},
        {"from": 2, "to": 3, "documents": 2},
        {"from": 8, "to": 15, "documents": 1},
    ]
    shown = [text[key] for key in ("length_mean", "length_shortest", "length_longest")]
    assert shown == [sum(sizes) / 6, 0, max(sizes)]
    assert text["languages"] == [
        {"extension": ".py", "documents": 2, "text_bytes": 6},
        {"extension": ".rs", "documents": 1, "text_bytes": 2},
        {"extension": "(none)", "documents": 1, "text_bytes": 0},
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;.jsonl" in page and "<b>" not in page
    assert not re.search("(src|href)=", page), "the page needs nothing else"
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[1:7] == ["6", "2", "1", "15", "-", "-"]


def test_bad_lines_end_the_report_with_their_place_or_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "a.jsonl", bad="[]\n{}\n")
    flags = ["--input", texts, "--output", str(tmp_path / "out")]
    assert main([*flags, "--max-bad-lines", "1"]) == 2
    error = capsys.readouterr().err
    assert f"{texts}, line 8" in error
    assert f"bad line 2 of {texts}, more than --max-bad-lines 1" in error
    assert not (tmp_path / "out").exists()
    found = report(tmp_path, "--input", texts, "--max-bad-lines", "2", "--no-duplicates")["a.jsonl"]
    assert (found["documents"], found["bad_lines"], found["duplicates"]) == (6, 2, None)


def test_extensions_are_of_paths_alone_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension_of({"metadata": {"file_path": "a.tar.gz"}}) == ".gz"
    assert extension_of({"path": "a." + "x" * 99}) == "(none)"
    assert extension_of({"path": 3, "meta": "b.py"}) is None
    monkeypatch.setattr(data_counts, "_MOST_EXTENSIONS", 2)
    counts = data_counts.DataCounts(name="a", unit="bytes", digests=None)
    for suffix in "abcad":
        counts.add_language({"path": f"x.{suffix}"}, 1)
    assert counts.languages == {".a": [2, 2], ".b": [1, 1], "(other)": [2, 2]}


def test_flag_that_messages_name_names_the_end_of_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_hf_tokenizer(tmp_path / "tokenizer", ["<unk>", "<x>"])
    texts = write_texts(tmp_path / "in.jsonl")
    flags = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", model, "--input", texts]
    rule = ["--filter", "length:min=1,unit=tokens", "--output", str(tmp_path / "kept")]
    for tool, more in ((main, ["--output", str(tmp_path / "out")]), (filter_data.main, rule)):
        assert tool([*flags, *more]) == 2
        assert "name the token with --eod-token" in capsys.readouterr().err
        more[-1] += "-named"
        assert tool([*flags, *more, "--eod-token", "<x>"]) == 0
    no_tokens = ["--input", texts, "--filter", "length:min=1", "--output", str(tmp_path / "other")]
    assert filter_data.main([*no_tokens, "--eod-token", "<x>"]) == 2
    assert "no filter counts tokens and none are made" in capsys.readouterr().err
