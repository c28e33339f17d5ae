"""Encoding by words gives the ids of whole texts, byte for byte, or is not done at all."""

import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from megatron.trainer.data import sentencepiece_words, word_cache
from megatron.trainer.data.sentencepiece_pieces import (
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_pieces,
    read_rules,
    without_prefix,
)
from megatron.trainer.data.sentencepiece_words import make_word_encoder
from megatron.trainer.data.word_cache import WordCache
from moe_app.data.train_tokenizer import train_sentencepiece
from tests.paths import REPO
from tests.unit.trainer.data.make_tokenizers import SENTENCES, make_sentencepiece

REAL = [
    path.read_text("utf-8")
    for folder, pattern in (("docs", "*.md"), ("moe_app/data", "*.py"))
    for path in sorted((REPO / folder).glob(pattern))
]
TRAINED_ON = "\n".join(REAL[::2])
HABITS: dict[str, dict[str, Any]] = {
    "prefix": {"add_dummy_prefix": True},
    "defined": {
        "defined": ["<a>", "\u2581\u2581x", "fox!", "|"],
        "control": ["<|end|>"],
    },
    "lines": {"defined": ["\n", "\n\n", "\r\n"]},
    "digits": {"split_digits": True, "allow_whitespace_only_pieces": True},
    "scripts": {"split_by_unicode_script": False, "split_by_number": False, "vocab_size": 340},
}
"""Settings of models of which texts may be cut."""


def load(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SentencePieceProcessor]:
    """Return a model of ours, and small ones of other habits."""
    root = tmp_path_factory.mktemp("models")
    found = {"ours": load(train_sentencepiece(iter(TRAINED_ON.splitlines(keepends=True)), 1500))}
    for name, habit in HABITS.items():
        found[name] = load(Path(make_sentencepiece(root / name, **habit)).read_bytes())
    return found


@pytest.fixture(scope="module")
def encoders(models: dict[str, SentencePieceProcessor]) -> dict[str, WordCache]:
    return {name: encoder_of(model) for name, model in models.items()}


def encoder_of(model: SentencePieceProcessor) -> WordCache:
    found = make_word_encoder(model)
    assert found is not None
    return found


def odd_texts(model: SentencePieceProcessor) -> Iterator[str]:
    """Yield hundreds of texts of pieces, spaces, marks and line ends in any order."""
    draw = random.Random(7)
    pieces = [model.IdToPiece(each).replace("\u2581", " ") for each in range(model.GetPieceSize())]
    marks = [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u2581",
        "\0",
        "12",
        "007",
        "\u00a0",
        "\x1f",
    ]
    marks += [*string.punctuation, "日本", "。", "é", "e\u0301", "🙂", "\ufffd", "\U0010ffff"]
    for size in range(400):
        yield "".join(draw.choice(draw.choice((pieces, marks))) for _ in range(size % 60))
        yield "".join(draw.choice(pieces) for _ in range(3))
    yield from ("", " ", "\n" * 50, " " * 50, "x" * 500, ("ab" * 40 + " ") * 5, "<unk><s><0x0A>")


def assert_alike(encoder: WordCache, model: SentencePieceProcessor, texts: Sequence[str]) -> None:
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == model.EncodeAsIds(text), text


@pytest.mark.parametrize("name", ["ours", *HABITS])
def test_words_have_the_ids_of_the_whole_text(
    name: str, models: dict[str, SentencePieceProcessor], encoders: dict[str, WordCache]
) -> None:
    texts = [*odd_texts(models[name]), *REAL]
    for start in range(0, len(texts), 100):
        assert_alike(encoders[name], models[name], texts[start : start + 100])


@given(texts=st.lists(st.text(), max_size=3), name=st.sampled_from(["ours", *HABITS]))
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_ids_of_the_library(
    texts: list[str],
    name: str,
    models: dict[str, SentencePieceProcessor],
    encoders: dict[str, WordCache],
) -> None:
    assert_alike(encoders[name], models[name], texts)


def is_cut(model: SentencePieceProcessor, pattern: Any, text: str) -> bool:
    """Return whether a text is cut where one of the model's pieces goes on."""
    words = pattern(text)
    assert "".join(words) == text
    ends = set(np.cumsum([len(word) for word in words]).tolist())
    texts = {
        piece.text
        for piece in read_pieces(model.serialized_model_proto())
        if piece.kind in (NORMAL, USER_DEFINED)
    }
    shown = text.replace(" ", "\u2581")
    return any(shown[at - 1 : at + 1] in piece for at in ends - {0, len(text)} for piece in texts)


@pytest.mark.parametrize("name", ["ours", *HABITS])
def test_no_cut_is_inside_a_pair_that_a_piece_has(
    name: str, models: dict[str, SentencePieceProcessor], encoders: dict[str, WordCache]
) -> None:
    texts = [*list(odd_texts(models[name]))[::9], *(text[:800] for text in REAL[:3])]
    assert not any(is_cut(models[name], encoders[name].cut, text) for text in texts)


def test_word_is_encoded_once(models: dict[str, SentencePieceProcessor]) -> None:
    encoder = encoder_of(models["ours"])
    texts: list[str] = []
    encode_words = encoder._encode_words

    def counting(words: Sequence[str]) -> Any:
        texts.extend(words)
        return encode_words(words)

    encoder._encode_words = counting
    ids = encoder.encode(REAL)
    num_encoded = sum(map(len, texts))
    assert 0 < num_encoded < sum(map(len, REAL)) / 3
    texts.clear()
    again = encoder.encode(REAL)
    assert all(map(np.array_equal, ids, again))
    kept = word_cache._LONGEST_KEPT
    assert sum(map(len, texts)) < num_encoded / 20
    assert all(len(word) > kept for word in texts)


def test_memory_is_bounded_and_words_that_do_not_come_again_are_not_looked_for(
    models: dict[str, SentencePieceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "_MOST_KEPT", 50)
    encoder = encoder_of(models["ours"])
    draw = random.Random(3)
    for _ in range(30):
        text = " ".join("".join(draw.choices(string.ascii_letters, k=9)) for _ in range(40))
        assert_alike(encoder, models["ours"], [text, REAL[0][:200], ""])
        assert len(encoder._known) <= 50
    encoder = encoder_of(models["ours"])
    encoder.encode(["".join(draw.choices(string.ascii_letters + " ", k=2000))])
    known = len(encoder._known)
    assert_alike(encoder, models["ours"], ["entirely new words qqq", ""])
    assert len(encoder._known) == known


@pytest.mark.parametrize(
    "habit",
    [
        {"model_type": "unigram", "vocab_size": 286},
        {"byte_fallback": False, "vocab_size": 60},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
        {"split_by_whitespace": False, "vocab_size": 330},
        {"defined": ["two words"]},
        {"defined": ["two\u2581words"], "vocab_size": 311},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_texts_of_other_models_are_not_cut(habit: dict[str, Any], tmp_path: Path) -> None:
    model = load(Path(make_sentencepiece(tmp_path, **habit)).read_bytes())
    assert make_word_encoder(model) is None


def test_model_with_unused_pieces_is_not_cut(models: dict[str, SentencePieceProcessor]) -> None:
    changed = bytearray(models["prefix"].serialized_model_proto())
    piece = next(each for each in read_pieces(bytes(changed)) if each.text == "\u2581the")
    # A normal piece leaves its kind out: put one into the byte-sized message of this one.
    written = piece.text.encode()
    at = bytes(changed).index(b"\x0a" + bytes([len(written)]) + written) - 1
    length = changed[at]
    changed[at] = length + 2
    changed[at + 1 + length : at + 1 + length] = bytes((3 << 3, UNUSED))
    model = load(bytes(changed))
    assert model.IsUnused(model.PieceToId("\u2581the"))
    assert make_word_encoder(model) is None
    assert make_word_encoder(models["prefix"]) is not None


def test_prefix_of_a_model_can_be_taken_away(models: dict[str, SentencePieceProcessor]) -> None:
    model = models["prefix"].serialized_model_proto()
    assert read_rules(model).adds_prefix and not read_rules(without_prefix(model)).adds_prefix
    bare = load(without_prefix(model))
    for text in SENTENCES[:1]:
        assert bare.EncodeAsIds(f" {text}") == models["prefix"].EncodeAsIds(text)
        assert bare.EncodeAsIds(text) != models["prefix"].EncodeAsIds(text)


def test_pattern_that_gives_other_ids_is_not_used(
    models: dict[str, SentencePieceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentencepiece_words, "_pattern", lambda words, has_lines: "(?s).")
    assert make_word_encoder(models["ours"]) is None
