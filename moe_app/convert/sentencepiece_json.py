"""Writes a SentencePiece BPE model as a tokenizer.json of the `tokenizers` library.

transformers builds a tokenizer of another kind from a tokenizer.model, without a word. The JSON
gives the same ids for the models that are accepted here: BPE without normalisation and without
user-defined pieces. `tokenizer_check` compares both on many texts before an export is good.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron.trainer.data.sentencepiece_pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePiecePiece,
    as_control,
    read_pieces,
)
from megatron.trainer.data.sentencepiece_tokenizer import SentencePieceTokenizer

_SPACE = "\u2581"
"""How SentencePiece writes a space."""
_BPE = 2
"""`model_type` of a BPE model."""
_USABLE = {NORMAL, UNKNOWN, CONTROL, BYTE}


def tokenizer_json(model: bytes, tokenizer: SentencePieceTokenizer) -> bytes:
    """Return the tokenizer.json of a model.

    Args:
        model: the .model file.
        tokenizer: the same, as the trainer reads it: what it takes for control pieces and puts
            first.

    Raises:
        ValueError: it is of a kind whose ids the JSON would not give; says which.
    """
    model = as_control(model, tokenizer.control_texts())
    spec = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = read_pieces(model)
    problem = _problem(spec, pieces)
    if problem is not None:
        raise ValueError(problem)
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    has_prefix = spec.normalizer_spec.add_dummy_prefix
    control = [number for number, piece in enumerate(pieces) if piece.kind == CONTROL]
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, pieces[number].text) for number in control],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _beginning(tokenizer),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(spec.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in _merges(pieces)],
        },
    }
    return (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode()


def _problem(spec: Any, pieces: Sequence[SentencePiecePiece]) -> str | None:
    """Say what the JSON could not express of a model; None if there is nothing."""
    normalizer = spec.normalizer_spec
    if spec.trainer_spec.model_type != _BPE:
        return "it is not a BPE model, and only those have merges"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"it normalises text ({normalizer.name or 'extra whitespace'})"
    if not normalizer.escape_whitespaces or spec.trainer_spec.treat_whitespace_as_suffix:
        return "it does not write a space as U+2581 before a word"
    odd = [piece.text for piece in pieces if piece.kind not in _USABLE]
    if odd:
        return f"it has pieces that are user-defined or unused ({odd[0]!r}, {len(odd)} in all)"
    if len({piece.text for piece in pieces}) < len(pieces):
        return "two of its pieces are written alike"
    return None


def _merges(pieces: Sequence[SentencePiecePiece]) -> Iterator[tuple[str, str]]:
    """Yield every way to join two normal pieces to a normal one: best score first, then by id."""
    normal = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == NORMAL}
    for text in sorted(normal, key=lambda each: (-pieces[normal[each]].score, normal[each])):
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                yield text[:cut], text[cut:]


def _added(token_id: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}


def _beginning(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """Return the post-processor that puts the BOS first, if the tokenizer does."""
    if not tokenizer.prefix:
        return None
    texts = [str(tokenizer.token_text(each)) for each in tokenizer.prefix]
    first = [{"SpecialToken": {"id": text, "type_id": 0}} for text in texts]
    rest = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*first, rest],
        "pair": [*first, rest, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in zip(texts, tokenizer.prefix, strict=True)
        },
    }
