"""Give blank lines, compressed files and pipes to the data tools: the same tokens come out."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.tokenizer import load_tokenizer
from moe_app.data import preprocess_data, text_chunks, train_tokenizer

KIND = "HFTokenizer"
VOCAB = 300
TEXTS = ["one two three", "", "caf\u00e9 \u65e5\u672c\u8a9e", "\n\n", "four"]
CORPUS = [f"{number} words of a corpus, {number**3} and more" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    args = ["--input", str(corpus), "--output-dir", str(folder), "--vocab-size", str(VOCAB)]
    assert train_tokenizer.main([*args, "--tokenizer-type", KIND]) == 0
    return str(folder / "tokenizer.json")


def preprocess(tokenizer_file: str, output: Path, *args: str) -> int:
    common = ["--output-prefix", str(output), "--tokenizer-type", KIND]
    return preprocess_data.main([*common, "--tokenizer-model", tokenizer_file, *args])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_blank_lines_and_compressed_inputs_change_no_token(
    tmp_path: Path,
    tokenizer_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
) -> None:
    monkeypatch.setattr(text_chunks, "_CHUNK_BYTES", 40)  # several chunks of blank lines
    records = [json.dumps({"text": text}) for text in TEXTS]
    plain = tmp_path / "plain"
    plain.write_text("\n".join(records) + "\n")
    gapped = tmp_path / "gapped"
    gapped.write_bytes(gzip.compress(("\n\n" + "\n \n".join(records) + "\n\n\n").encode()))
    outputs = []
    for path in (plain, gapped):
        args = ("--input", str(path), "--workers", workers)
        assert preprocess(tokenizer_file, tmp_path / "out", *args) == 0
        prefix = tmp_path / "out_text_document"
        outputs.append([Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")])
    assert outputs[0] == outputs[1]
    report = capsys.readouterr().out
    assert "4 documents (1 empty ones skipped)" in report
    assert "4 documents (1 empty ones and 8 blank lines skipped)" in report


def test_standard_input_serves_every_key(
    tmp_path: Path,
    tokenizer_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b'{"q": "why", "a": "because"}\n'))
    monkeypatch.setattr(sys, "stdin", given)
    args = ("--input", "-", "--json-keys", "q", "a")
    assert preprocess(tokenizer_file, tmp_path / "out", *args) == 0
    for key, text in (("q", "why"), ("a", "because")):
        tokens = open_tokens(str(tmp_path / f"out_{key}_document")).tokens
        assert load_tokenizer(KIND, tokenizer_file).decode(tokens.tolist()) == text


def test_cut_off_input_leaves_no_files(
    tmp_path: Path, tokenizer_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "a.jsonl.gz", tmp_path / "out"
    path.write_bytes(gzip.compress(json.dumps({"text": "word " * 999}).encode())[:-9])
    assert preprocess(tokenizer_file, folder / "p", "--input", str(path)) == 2
    assert f"error: {path}, line 1: cannot be read (" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_tokenizer_is_trained_on_compressed_and_gapped_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = []
    lines = [json.dumps({"text": text}) for text in CORPUS]
    forms = ("\n".join(lines).encode(), gzip.compress(("\n\n" + "\n".join(lines)).encode()))
    for number, data in enumerate(forms):
        path = tmp_path / f"in{number}"
        path.write_bytes(data)
        out = tmp_path / f"out{number}"
        args = ["--input", str(path), "--output-dir", str(out), "--vocab-size", str(VOCAB)]
        assert train_tokenizer.main([*args, "--tokenizer-type", KIND]) == 0
        models.append((out / "tokenizer.json").read_bytes())
    assert models[0] == models[1]
    assert capsys.readouterr().out.count("2 blank lines skipped") == 1
