"""Encoding by words gives the ids of the tokenizers library, or is not done at all."""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from megatron.trainer.data import word_cache
from megatron.trainer.data.hf_tokenizer import HFTokenizer
from moe_app.data.train_tokenizer import train_hf
from tests.paths import REPO

REAL = [path.read_text("utf-8") for path in sorted((REPO / "docs").glob("*.md"))[:12]]
ADDED = [AddedToken(" " * count, normalized=False) for count in range(2, 6)]
ADDED += [
    AddedToken("|||IP_ADDRESS|||", normalized=False),
    AddedToken("caf\u00e9", normalized=True),
]
Texts = Sequence[str]


def as_olmo(file: dict[str, Any]) -> None:
    file["normalizer"] = {"type": "NFC"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plain") / "tokenizer.json"
    path.write_bytes(train_hf(iter("\n".join(REAL[::2]).splitlines(keepends=True)), 1200))
    return str(path)


@pytest.fixture(scope="module")
def tokenizers(plain: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFTokenizer]:
    """Return a tokenizer of ours, and one with OLMo's habits: added runs of spaces and marks."""
    like_olmo = Tokenizer.from_file(plain)
    like_olmo.add_tokens(ADDED)
    file = json.loads(like_olmo.to_str())
    as_olmo(file)
    path = tmp_path_factory.mktemp("olmo") / "tokenizer.json"
    path.write_text(json.dumps(file))
    return {"ours": HFTokenizer(plain), "olmo": HFTokenizer(str(path))}


def assert_alike(tokenizer: HFTokenizer, texts: Texts) -> None:
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert ids.tolist() == tokenizer.encode_document(text), text


@pytest.mark.parametrize("name", ["ours", "olmo"])
def test_words_have_the_ids_of_the_whole_text(
    name: str, tokenizers: dict[str, HFTokenizer]
) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer._word_cache is not None
    draw = random.Random(5)
    marks = [
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x85",
        "\0",
    ]
    marks += [
        *string.punctuation,
        "'s",
        "don't",
        "12",
        "\u0301",
        "\u0338",
        "é",
        "日本",
        "🙂",
        "word",
    ]
    marks += ["|||IP_ADDRESS|||", "cafe\u0301", "<|endoftext|>"]
    odd = ["".join(draw.choices(marks, k=size % 40)) for size in range(800)]
    assert_alike(tokenizer, odd)
    assert_alike(tokenizer, REAL)
    assert_alike(tokenizer, REAL)  # of which all words are known by now


@given(texts=st.lists(st.text(), max_size=3), name=st.sampled_from(["ours", "olmo"]))
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_ids_of_the_library(
    texts: list[str], name: str, tokenizers: dict[str, HFTokenizer]
) -> None:
    assert_alike(tokenizers[name], texts)


def test_word_is_encoded_once(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = HFTokenizer(plain)
    cache = tokenizer._word_cache
    assert cache is not None
    first = tokenizer.encode_documents(REAL)
    monkeypatch.setattr(word_cache, "_LONGEST_KEPT", 1 << 20)
    assert 1000 < len(cache._known) < sum(text.count(" ") for text in REAL) / 2
    tokenizer.encode_documents(REAL)
    monkeypatch.setattr(cache, "_encode_words", lambda words: iter(list(words) and [None]))
    again = tokenizer.encode_documents(REAL)
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in first]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFKC"}},
        {"added": AddedToken("two words", normalized=False)},
        {"added": AddedToken("x", lstrip=True)},
        {"added": AddedToken("x", single_word=True)},
    ],
    ids=lambda change: "-".join(change),
)
def test_texts_of_other_files_are_not_cut(
    change: dict[str, Any], plain: str, tmp_path: Path
) -> None:
    made = Tokenizer.from_file(plain)
    if "added" in change:
        made.add_tokens([change["added"]])
    file = json.loads(made.to_str())
    for name in change.keys() - {"added"}:
        value = change[name]
        file[name] = {"trim_offsets": True, **value} if name == "pre_tokenizer" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert HFTokenizer(str(tmp_path / "tokenizer.json"))._word_cache is None
