"""Check the corpus made from the standard library, and what a JSON Lines file may hold."""

import ast
import json
import re
from pathlib import Path

import pytest

from megatron.trainer.data.jsonl import parse_text
from megatron.trainer.errors import DataError
from moe_app.data import build_corpus


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "f, line 9: not JSON (Unterminated string starting at:"),
        (b"", "f, line 9: not JSON (Expecting value:"),
        (b'{"text": "\xff"}', "f, line 9: not JSON ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "f, line 9: not JSON (maximum recursion depth exceeded"),
        (
            b'["text"]',
            "f, line 9: a JSON list; each line must be one JSON object; repair or remove the line",
        ),
        (
            b'{"body": "x", "id": 1}',
            "f, line 9: no key 'text' among ['body', 'id']; each object must have it; name the"
            " right key with --json-keys",
        ),
        (
            b'{"text": null}',
            "f, line 9: 'text' is a NoneType; it must be a string; repair or remove the line",
        ),
        (
            b'{"text": "ab\\ud800"}',
            "f, line 9: 'text' has a lone surrogate at character 2; text must be valid Unicode;"
            " repair or remove the line",
        ),
    ],
)
def test_line_without_a_text_is_refused(line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        parse_text(line, key="text", path="f", number=9)


def test_corpus_is_valid_and_deterministic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        args = ["--output-dir", str(tmp_path / name), "--max-megabytes", "0.1"]
        assert build_corpus.main(args) == 0
    report = capsys.readouterr().out
    for name in ("code.jsonl", "docs.jsonl"):
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        texts = [json.loads(line)["text"] for line in data.splitlines()]
        size = sum(len(text.encode()) for text in texts)
        assert 10_000 < size <= 100_000
        expected = f"{tmp_path / 'one' / name}: {len(texts):,} documents, {size:,} bytes of text"
        assert expected in report
        if name == "code.jsonl":
            for text in texts:
                ast.parse(text)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "code.jsonl",
        "docs.jsonl",
    ]


def test_source_files_exclude_tests_large_and_empty_files(tmp_path: Path) -> None:
    names = ["a.py", "b/c.py", "test/d.py", "b/tests/e.py", "idlelib/f.py", "big.py", "empty.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "big.py").write_text("#" * 500_001)
    (tmp_path / "empty.py").write_text("")
    found = {str(path.relative_to(tmp_path)) for path in build_corpus.source_files(tmp_path)}
    assert found == {"a.py", "b/c.py"}


def test_unusable_files_are_counted_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'B', 'a': 'A'}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "good.py").write_text('"""Doc."""\n')
    skipped = build_corpus.Skipped()
    documents = list(build_corpus.docs_documents(tmp_path, skipped))
    assert sorted(documents) == ["A", "B", "good\n\nDoc.\n"]
    assert (skipped.undecodable, skipped.unparsable) == (1, 1)
    code = list(build_corpus.code_documents(tmp_path, skipped := build_corpus.Skipped()))
    assert sorted(code) == ['"""Doc."""\n', "def :\n"]
    assert skipped.undecodable == 1


def test_docstrings_are_read_in_order_without_importing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    source = (
        f'"""Top."""\nopen({str(canary)!r}, "w")\n'
        'class A:\n    """Of A."""\n    async def f(self):\n        """Of f.\n\n        More.\n'
        '        """\n    def g(self): pass\n'
    )
    text = build_corpus.docstrings(source, module="m")
    assert text == "m\n\nTop.\n\nm.A\n\nOf A.\n\nm.A.f\n\nOf f.\n\nMore.\n"
    assert build_corpus.docstrings("x = 1", module="m") is None
    assert build_corpus.module_name(Path("json/__init__.py")) == "json"
    assert build_corpus.module_name(Path("json/tool.py")) == "json.tool"
    assert not canary.exists()


def test_library_without_topics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pydoc_data" / "topics.py"
    with pytest.raises(DataError, match=re.escape(f"{path} holds no dictionary `topics` (")):
        build_corpus.topics(tmp_path)
