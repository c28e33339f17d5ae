"""Check the data tools: exact round trips, equal output for any worker count, atomic files."""

import hashlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.jsonl import TextLines
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import ConfigError, DataError
from moe_app.data import build_corpus, preprocess_data, train_tokenizer
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

TYPES = ["SentencePieceTokenizer", "HFTokenizer"]
FILES = {"SentencePieceTokenizer": "tokenizer.model", "HFTokenizer": "tokenizer.json"}
VOCAB = 400
TEXTS = [
    "def f(x):\n    if x:\n\treturn 'tab'\n        # eight\n    return  x\n",
    "  leading, trailing and   inner   spaces  ",
    "\n\n\r\n\t \x0b\x0c\n",
    "naïve café — 日本語 🙂 e\u0301 \u00e9 ﬁ Ω Ω \u2585 \u00a0\u3000 \ufeff a\0b",
    "<|endoftext|> <s> </s> <unk> <0x0A>",
    "12345 0x1F 3.14159e-10",
    "",
]


def write_jsonl(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Train a small tokenizer of each type on the data tools' own sources."""
    folder = tmp_path_factory.mktemp("tokenizers")
    sources = [
        Path(str(module.__file__)) for module in (build_corpus, preprocess_data, train_tokenizer)
    ]
    corpus = write_jsonl(folder / "in.jsonl", [path.read_text() for path in sources])
    for kind in TYPES:
        args = ["--input", corpus, "--output-dir", str(folder), "--tokenizer-type", kind]
        assert train_tokenizer.main([*args, "--vocab-size", str(VOCAB)]) == 0
    return {kind: str(folder / name) for kind, name in FILES.items()}


@pytest.fixture(scope="module")
def tokenizers(tokenizer_files: dict[str, str]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(kind, path) for kind, path in tokenizer_files.items()}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


@given(text=st.text().filter(lambda text: "\u2581" not in text))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(tokenizers: dict[str, Tokenizer], text: str) -> None:
    # SentencePiece stores a space as U+2581, the only exception.
    for kind in TYPES:
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", TYPES)
def test_no_space_is_prepended(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    assert len(tokenizers[kind].encode("\n")) == 1


@pytest.mark.parametrize("kind", TYPES)
def test_text_cannot_forge_the_end_of_a_document(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.eod not in tokenizer.encode("a <|endoftext|> b")


@pytest.mark.parametrize("kind", TYPES)
def test_vocabulary_has_the_requested_size_and_learned_pieces(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.vocab_size == VOCAB
    assert 0 <= tokenizer.eod < VOCAB
    assert len(tokenizer.encode("        return text")) < 0.75 * len("        return text")


def test_sample_alternates_between_files_up_to_the_limit(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / "a", ["a1", "a2", "a3"]),
        write_jsonl(tmp_path / "b", ["b1"]),
    ]

    def sample(limit_bytes: int) -> list[str]:
        inputs = [TextLines(path) for path in paths]
        return list(train_tokenizer.sample_texts(inputs, key="text", limit_bytes=limit_bytes))

    assert sample(1000) == ["a1", "b1", "a2", "a3"]
    assert sample(4) == ["a1", "b1"]


@pytest.mark.parametrize("kind", TYPES)
def test_too_large_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    corpus = write_jsonl(tmp_path / "in.jsonl", ["too little"])
    args = ["--input", corpus, "--output-dir", str(tmp_path / "out"), "--tokenizer-type", kind]
    assert train_tokenizer.main([*args, "--vocab-size", "5000"]) == 2
    assert capsys.readouterr().err.startswith("error: --vocab-size 5000 does not fit the input (")
    assert not (tmp_path / "out").exists()


def test_unknown_type_and_missing_file_are_refused(tmp_path: Path) -> None:
    message = (
        "--tokenizer-type Bert is unknown; it must be one of SentencePieceTokenizer, HFTokenizer"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_tokenizer("Bert", "x")
    message = (
        "--tokenizer-type HFTokenizer needs a file, but --tokenizer-model is not given; name the"
        " .model or .json file"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_tokenizer("HFTokenizer", None)
    path = tmp_path / "none.model"
    message = (
        f"tokenizer {path} does not exist or is not a file; --tokenizer-model must name the .model"
        " or .json file; check the path"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_tokenizer("SentencePieceTokenizer", str(path))


@pytest.mark.parametrize(
    ("kind", "other", "name"),
    [
        (TYPES[0], TYPES[1], "a SentencePiece model"),
        (TYPES[1], TYPES[0], "a tokenizers JSON file"),
    ],
)
def test_file_of_the_other_type_is_refused(
    tokenizer_files: dict[str, str], kind: str, other: str, name: str
) -> None:
    path = tokenizer_files[other]
    with pytest.raises(DataError) as raised:
        load_tokenizer(kind, path)
    message = str(raised.value)
    assert message.startswith(f"tokenizer {path} is not {name} (")
    assert message.endswith(
        "--tokenizer-type and --tokenizer-model must agree (SentencePieceTokenizer, HFTokenizer);"
        " choose the other type or restore the file"
    )


def test_json_without_an_end_of_document_is_refused(
    tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    data = json.loads(Path(tokenizer_files["HFTokenizer"]).read_text())
    data["added_tokens"] = []
    del data["model"]["vocab"]["<|endoftext|>"]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    message = (
        f"nothing says which token of {path} ends a document: it has no '<|endoftext|>', and the"
        " files beside it (no tokenizer_config.json or other such file) name no eos_token and no"
        " eos_token_id that is a token of it; name the token with --eod-token; it has none that"
        " no text becomes"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_tokenizer("HFTokenizer", str(path))


def preprocess(files: dict[str, str], kind: str, output: Path, *args: str) -> int:
    common = ["--output-prefix", str(output), "--tokenizer-type", kind]
    return preprocess_data.main([*common, "--tokenizer-model", files[kind], *args])


@pytest.mark.parametrize("kind", TYPES)
def test_token_file_holds_each_document_and_its_end(
    tmp_path: Path,
    tokenizer_files: dict[str, str],
    tokenizers: dict[str, Tokenizer],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of torch and megatron-core at import
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", TEXTS[:4]),
        write_jsonl(tmp_path / "b.jsonl", TEXTS[4:]),
    ]
    assert (
        preprocess(tokenizer_files, kind, tmp_path / "out", "--input", *inputs, "--append-eod") == 0
    )
    tokenizer = tokenizers[kind]
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS if text]
    prefix = str(tmp_path / "out_text_document")
    read = IndexedDataset(prefix)
    assert [read[i].tolist() for i in range(len(read))] == expected
    file = open_tokens(prefix, vocab_size=VOCAB)
    assert (file.num_documents, file.num_tokens) == (6, sum(map(len, expected)))
    report = capsys.readouterr().out
    assert f"{prefix}: 6 documents (1 empty ones skipped), {file.num_tokens:,} tokens" in report
    assert report.rstrip().endswith("tokens/s")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("named", [True, False], ids=["named by its config", "named by the flag"])
def test_document_begins_and_ends_as_the_files_of_a_directory_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool, workers: str
) -> None:
    folder = tmp_path / "hf"
    config = {"config": {"eos_token_id": 2}} if named else {}
    path = make_hf_tokenizer(folder, ["<unk>", "<s>", "</s>"], plain=["<sep>"], bos="<s>", **config)
    truth = TokenizersTokenizer.from_file(path)
    texts = ["the quick fox", "", "a </s> and a <s>, spelled"]
    args = ["--input", write_jsonl(tmp_path / "in.jsonl", texts), "--workers", workers]
    args += ["--output-prefix", str(tmp_path / "out"), "--append-eod"]
    args += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    args += [] if named else ["--eod-token", "</s>"]
    assert preprocess_data.main(args) == 0
    source = f"the eos_token_id of {folder / 'config.json'}" if named else "--eod-token"
    told = f"documents end with '</s>' (id 2): {source}; texts begin with '<s>'\n"
    assert told in capsys.readouterr().out
    truth.encode_special_tokens = True
    expected = [[*truth.encode(text).ids, 2] for text in texts if text]
    assert expected[0][0] == 1
    found = open_tokens(str(tmp_path / "out_text_document"))
    assert found.tokens.tolist() == list(chain.from_iterable(expected))
    assert found.num_documents == 2


@pytest.mark.parametrize("appended", [True, False])
def test_manifest_says_what_wrote_the_token_file(
    tmp_path: Path,
    tokenizer_files: dict[str, str],
    tokenizers: dict[str, Tokenizer],
    appended: bool,
) -> None:
    kind = TYPES[1]
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    more = ("--append-eod",) if appended else ()
    assert preprocess(tokenizer_files, kind, tmp_path / "out", "--input", source, *more) == 0
    prefix = tmp_path / "out_text_document"
    content = json.loads(Path(f"{prefix}.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", content.pop("work_sha256"))
    counted = ("num_text_bytes", "num_empty_documents", "num_documents", "num_tokens")
    assert content.pop("sources") == [
        {
            "path": source,
            "num_bytes": Path(source).stat().st_size,
            "num_lines": len(TEXTS),
            "num_blank_lines": 0,
            "num_bad_lines": 0,
            **{name: content[name] for name in counted},
        }
    ]
    assert content == {
        "num_bad_lines": 0,
        "num_shards": 1,
        "shard_index": 0,
        "format": "token file manifest",
        "format_version": 1,
        "tokenizer_type": kind,
        "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": hashlib.sha256(Path(tokenizer_files[kind]).read_bytes()).hexdigest(),
        "vocab_size": VOCAB,
        "eod_token_id": tokenizers[kind].eod if appended else None,
        "num_input_files": 1,
        "num_text_bytes": sum(len(text.encode()) for text in TEXTS),
        "num_empty_documents": 1,
        "dtype": "uint16",
        "num_documents": len(TEXTS) - 1,
        "num_tokens": Path(f"{prefix}.bin").stat().st_size // 2,
        "fingerprint": open_tokens(str(prefix)).facts.fingerprint,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl",
        *(f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")),
    ]


def test_input_that_lies_where_the_manifest_belongs_is_never_replaced(
    tmp_path: Path, tokenizer_files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "out_text_document.json", TEXTS)
    before = Path(source).read_bytes()
    assert preprocess(tokenizer_files, TYPES[0], tmp_path / "out", "--input", source) == 2
    assert capsys.readouterr().err.startswith(f"error: {source} stands where the manifest of a")
    assert [path.name for path in tmp_path.iterdir()] == ["out_text_document.json"]
    assert Path(source).read_bytes() == before


def test_without_append_eod_only_the_text_is_written(
    tmp_path: Path, tokenizer_files: dict[str, str], tokenizers: dict[str, Tokenizer]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert preprocess(tokenizer_files, TYPES[0], tmp_path / "out", "--input", source) == 0
    expected = list(chain.from_iterable(tokenizers[TYPES[0]].encode(text) for text in TEXTS))
    assert open_tokens(str(tmp_path / "out_text_document")).tokens.tolist() == expected


def test_each_key_gets_its_own_file(
    tmp_path: Path, tokenizer_files: dict[str, str], tokenizers: dict[str, Tokenizer]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "why", "a": "because"}\n')
    args = ("--input", str(tmp_path / "a.jsonl"), "--json-keys", "q", "a")
    assert preprocess(tokenizer_files, TYPES[0], tmp_path / "out", *args) == 0
    for key, text in (("q", "why"), ("a", "because")):
        tokens = open_tokens(str(tmp_path / f"out_{key}_document")).tokens
        assert tokenizers[TYPES[0]].decode(tokens.tolist()) == text


GOOD = b'{"text": "fine"}'


@pytest.mark.parametrize("workers", ["1", "2"])
def test_invalid_line_is_named_and_leaves_no_files(
    tmp_path: Path,
    tokenizer_files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    workers: str,
) -> None:
    path, folder = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(b"\n".join([GOOD, GOOD, b'{"text": 7}', GOOD]))
    args = ("--input", str(path), "--workers", workers)
    assert preprocess(tokenizer_files, TYPES[0], folder / "p", *args) == 2
    assert capsys.readouterr().err == (
        f"error: {path}, line 3: 'text' is a int; it must be a string; repair or remove the line"
        " (--max-bad-lines is 0: raise it to skip and count such lines)\n"
    )
    assert list(folder.iterdir()) == []


def test_missing_and_empty_inputs_are_refused(
    tmp_path: Path, tokenizer_files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    missing, empty = tmp_path / "none", write_jsonl(tmp_path / "a.jsonl", ["", ""])
    assert preprocess(tokenizer_files, TYPES[0], tmp_path / "p", "--input", str(missing)) == 2
    assert capsys.readouterr().err == (
        f"error: {missing} does not exist or is not a file; an input must be a JSON Lines file;"
        " check the path\n"
    )
    assert preprocess(tokenizer_files, TYPES[0], tmp_path / "p", "--input", empty) == 2
    assert capsys.readouterr().err == (
        f"error: {empty}: 0 documents with text under 'text', 2 without; there must be at least"
        " one; check --input and --json-keys\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_workers_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--input", "a", "--output-prefix", "p", "--tokenizer-model", "m", "--workers", "0"]
    with pytest.raises(SystemExit) as stopped:
        preprocess_data.main(args)
    assert stopped.value.code == 2
    assert "--workers is 0; it must be at least 1" in capsys.readouterr().err


def test_data_tools_do_not_import_torch() -> None:
    code = (
        "import sys; from moe_app.data import preprocess_data, train_tokenizer;"
        " sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=300, check=False)
    assert done.returncode == 0
