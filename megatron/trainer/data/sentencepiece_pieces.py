"""Reads the pieces of a SentencePiece model from its protocol buffer.

The library's Python interface tells neither which pieces are user-defined nor how to change one.
"""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The kinds of pieces."""

_PIECES, _TEXT, _SCORE, _KIND = 1, 1, 2, 3
"""Field numbers: of the model's pieces, and of a piece's parts."""
_TRAINER, _NORMALIZER = 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BYTE_PAIRS = 2
VARINT, _EIGHT_BYTES, SIZED, _FOUR_BYTES = 0, 1, 2, 5
"""Wire types."""


@dataclass(frozen=True, kw_only=True)
class SentencePiecePiece:
    """Describes a piece; its id is its place in the model."""

    text: str
    """How it is written; a space is U+2581."""
    score: float
    """Its logarithmic probability, or its negative rank in a BPE model."""
    kind: int
    """One of the six kinds."""
    kind_at: int | None
    """Where the model has the first byte of its kind; None for a piece that leaves it out."""


def read_pieces(model: bytes) -> list[SentencePiecePiece]:
    """Return the pieces of a model, in the order of their ids.

    Raises:
        ValueError: These bytes are no such message.
    """
    return [
        _read_piece(model, start, stop)
        for number, wire_type, start, stop in message_fields(model, 0, len(model))
        if (number, wire_type) == (_PIECES, SIZED)
    ]


def as_control(model: bytes, texts: Collection[str]) -> bytes:
    """Return the model with some user-defined pieces made control pieces, which no text becomes.

    Raises:
        ValueError: These bytes are no such message.
    """
    changed = bytearray(model)
    for piece in read_pieces(model):
        if piece.kind == USER_DEFINED and piece.text in texts and piece.kind_at is not None:
            changed[piece.kind_at] = CONTROL | changed[piece.kind_at] & 0x80
    return bytes(changed)


@dataclass(frozen=True, kw_only=True)
class SentencePieceRules:
    """Says how a model turns a text into pieces, as far as that decides where it may be cut."""

    is_byte_pair: bool
    """Whether it joins neighbours, best pair first."""
    has_byte_fallback: bool
    """Whether a character without a piece becomes its bytes."""
    keeps_text: bool
    """Whether all that is done to a text before is that each space becomes U+2581."""
    adds_prefix: bool
    """Whether a space is put before a text."""


def read_rules(model: bytes) -> SentencePieceRules:
    """Return the rules of a model.

    Raises:
        ValueError: These bytes are no such message.
    """
    trainer, normalizer = (_read_settings(model, each) for each in (_TRAINER, _NORMALIZER))
    return SentencePieceRules(
        is_byte_pair=trainer.get(_MODEL_TYPE) == _BYTE_PAIRS,
        has_byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        keeps_text=not normalizer.get(_CHARACTER_MAP, 0)
        and not normalizer.get(_REMOVE_SPACES, 1)
        and bool(normalizer.get(_ESCAPE_SPACES, 1))
        and not trainer.get(_SUFFIX, 0),
        adds_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
    )


def without_prefix(model: bytes) -> bytes:
    """Return the model such that it puts no space before a text."""
    # A message that comes twice is merged: its later fields count.
    return model + bytes((_NORMALIZER << 3 | SIZED, 2, _DUMMY_PREFIX << 3 | VARINT, 0))


def _read_settings(model: bytes, message: int) -> dict[int, int]:
    """Return integers of a message by their field numbers, and of other fields the lengths."""
    found = {}
    for number, wire_type, start, stop in message_fields(model, 0, len(model)):
        if (number, wire_type) == (message, SIZED):
            for field, kind, begin, end in message_fields(model, start, stop):
                is_number = kind == VARINT
                found[field] = read_varint(model, begin, end)[0] if is_number else end - begin
    return found


def _read_piece(model: bytes, start: int, stop: int) -> SentencePiecePiece:
    text, score, kind, kind_at = "", 0.0, NORMAL, None
    for number, wire_type, begin, end in message_fields(model, start, stop):
        if (number, wire_type) == (_TEXT, SIZED):
            text = model[begin:end].decode("utf-8", errors="replace")
        elif (number, wire_type) == (_SCORE, _FOUR_BYTES):
            (score,) = struct.unpack("<f", model[begin:end])
        elif (number, wire_type) == (_KIND, VARINT):
            kind, kind_at = read_varint(model, begin, end)[0], begin
    return SentencePiecePiece(text=text, score=score, kind=kind, kind_at=kind_at)


def message_fields(model: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, and bounds of the content of each field of a message."""
    at = start
    while at < stop:
        key, at = read_varint(model, at, stop)
        wire_type = key & 7
        if wire_type == SIZED:
            length, at = read_varint(model, at, stop)
        elif wire_type == VARINT:
            length = read_varint(model, at, stop)[1] - at
        elif wire_type in (_FOUR_BYTES, _EIGHT_BYTES):
            length = 4 if wire_type == _FOUR_BYTES else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + length > stop:
            raise ValueError(f"a field of {length} bytes at byte {at} of {stop}")
        yield key >> 3, wire_type, at, at + length
        at += length


def read_varint(model: bytes, at: int, stop: int) -> tuple[int, int]:
    """Return an integer of variable length, and where it ends."""
    value = 0
    for count, byte in enumerate(model[at : min(stop, at + 10)]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError(f"an integer without an end at byte {at}")
