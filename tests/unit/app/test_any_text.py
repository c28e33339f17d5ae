"""Print texts and paths beyond ASCII where the output takes ASCII only."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_app import cli
from moe_app.command_line import argument_text, prints_any_text
from tests.paths import REPO

ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def test_what_cannot_be_encoded_is_printed_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def command(text: str, *, status: int) -> int:
        for stream in (sys.stdout, sys.stderr):
            stream.write(text)
            stream.flush()
        return status

    assert prints_any_text(command)("a \u65e5 \udcff", status=3) == 3
    for stream in (out, err):
        assert isinstance(stream.buffer, io.BytesIO)
        assert stream.buffer.getvalue() == rb"a \u65e5 \udcff"


def test_every_command_prints_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (*(each.run for each in cli.COMMANDS.values()), cli.main):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        with pytest.raises((TypeError, AttributeError)):
            command(0)  # type: ignore[arg-type]  # no list of arguments: it ends before it begins
        assert sys.stdout.errors == "backslashreplace"


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u65e5\u672c"])
def test_arguments_are_read_as_utf_8(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert argument_text(text) == text
    ascii_only = text.encode("utf-8").decode("ascii", "surrogateescape")
    monkeypatch.setattr(os, "fsencode", lambda given: given.encode("ascii", "surrogateescape"))
    assert argument_text(ascii_only) == text
    assert argument_text("one\udcff") == "one\udcff"


def test_a_command_runs_under_an_ascii_locale(tmp_path: Path) -> None:
    (tmp_path / "caf\u00e9.jsonl").write_text('{"na\u00efve": ["no text"]}\n', "utf-8")
    done = subprocess.run(
        [
            *(sys.executable, REPO / "tools" / "train_tokenizer.py"),
            *("--input", tmp_path / "caf\u00e9.jsonl", "--json-key", "na\u00efve"),
            *("--output-dir", tmp_path / "out"),
        ],
        env={**os.environ, **ASCII_ONLY},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert b".jsonl, line 1: 'na\\xefve' is a list; it must be a string" in done.stderr
    assert b"Traceback" not in done.stderr
