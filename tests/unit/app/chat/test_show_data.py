"""Tests what `megatron-moe show-data` prints."""

import json
from pathlib import Path

import pytest

from moe_app.cli import main
from tests.unit.app.chat.make_chat import END, make_tokenizer, write_rows

CHAT = {
    "messages": [
        {"role": "user", "content": f"hi {END} \x1b[31m"},
        {"role": "assistant", "content": "hello\nworld"},
    ]
}


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    make_tokenizer(tmp_path / "tokenizer")
    return ["show-data", "--tokenizer-model", str(tmp_path / "tokenizer"), "--train-data"]


def test_what_counts_is_marked(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT, "{", CHAT])
    assert main([*common, path, "-n", "1"]) == 0
    out = capsys.readouterr().out
    text = f"{END}<|user|>\nhi {END} \\x1b[31m\n<|assistant|>\n【hello\nworld{END}】\n"
    assert text in out and f"── {path}, line 1: conversation" in out
    assert main([*common, path, "--max-bad-rows", "1", "--train-on", "all"]) == 0
    out = capsys.readouterr().out
    assert out.count("【<|user|>") == 2 and "without a conversation: 1" in out
    assert main([*common, path]) == 2
    assert "line 2: not JSON" in capsys.readouterr().err
    assert main([*common, path, "--seq-length", "3", "-n", "1", "--max-bad-rows", "1"]) == 2
    assert "no row is left" in capsys.readouterr().err


def test_tokens_are_listed_and_a_cut_text_ends(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT])
    arguments = [*common, path, "--token-ids", "--seq-length", "47", "--overlong", "truncate"]
    assert main(arguments) == 0
    lines = [each.split("  ") for each in capsys.readouterr().out.splitlines() if "'" in each]
    listed = [line[-1] for line in lines]
    assert len(lines) == 47 and listed[0] == f"{END!r}" and listed[-2:] == ["【'he'】", "【'l'】"]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("preference", {"prompt": "q", "chosen": "yes", "rejected": "no"}, ["chosen", "rejected"]),
        ("kto", {"prompt": "q", "completion": "yes", "label": False}, ["completion, undesirable"]),
    ],
)
def test_other_kinds_are_shown(
    kind: str,
    row: dict[str, object],
    expected: list[str],
    common: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [json.dumps(row)])
    assert main([*common, path, "--kind", kind, "--template", "zephyr"]) == 0
    out = capsys.readouterr().out
    assert all(f"line 1: {each}," in out for each in expected)
    assert f"<|user|>\nq{END}\n<|assistant|>\n【yes{END}】" in out
