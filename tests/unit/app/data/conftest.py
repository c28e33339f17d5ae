"""Give a small tokenizer, a corpus of three files, and preprocessing of it in small chunks."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from moe_app.data import preprocess_data, text_chunks
from tests.unit.app.data.token_files import TEXTS
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_hf_tokenizer(folder, ["<unk>", "</s>"], config={"eos_token_id": 1})


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: str) -> Tokenizer:
    return load_tokenizer("HFTokenizer", tokenizer_file)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give three files, of which the second is compressed, with blank lines."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" * (1 + n % 3) for n, text in enumerate(TEXTS)]
    parts = ["".join(part) for part in (lines[:150], lines[150:250], lines[250:])]
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl")
    for name, part in zip(names, parts, strict=True):
        data = part.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return [str(folder / name) for name in names]


@pytest.fixture
def run(tokenizer_file: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(text_chunks, "_CHUNK_BYTES", 700)
    monkeypatch.setattr(text_chunks, "_BLOCK_BYTES", 90)

    def call(output: Path, *args: str) -> int:
        flags = ["--output-prefix", str(output)]
        if "--merge" not in args:
            flags += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer_file]
        return preprocess_data.main([*flags, *args])

    return call
