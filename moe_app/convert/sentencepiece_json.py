"""Writes a SentencePiece model as a tokenizer.json of the `tokenizers` library.

That is possible for one kind: BPE with byte fallback whose normaliser changes nothing but spaces.
transformers takes every tokenizer.model for one of the model family's usual kind.
"""

from collections.abc import Collection, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from megatron.trainer.data.sentencepiece_pieces import (
    CONTROL,
    NORMAL,
    SIZED,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    VARINT,
    SentencePiecePiece,
    message_fields,
    read_pieces,
    read_varint,
)

SPACE = "\u2581"
"""What a piece has for a space."""

_TRAINER, _NORMALIZER, _DENORMALIZER = 2, 3, 5
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARACTER_MAP, _PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5
"""Field numbers: of the parts of a model, of its trainer's settings, of its normaliser's."""
_BPE = 2
_MODEL_TYPES = {1: "Unigram", _BPE: "BPE", 3: "words", 4: "characters"}
_SHOWN = 3


def to_tokenizer_json(
    model: bytes, *, control: Collection[str] = (), prefix: Sequence[str] = ()
) -> bytes:
    """Return the tokenizer.json that gives the ids of a SentencePiece model.

    Args:
        model: the content of the .model file.
        control: user-defined pieces that the trainer takes for control pieces.
        prefix: the pieces that the trainer puts before each text.

    Raises:
        ValueError: the library cannot give the same ids; says why.
    """
    pieces = read_pieces(model)
    _check_pieces(pieces, control)
    adds_space = _check_settings(model)
    ids = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if adds_space else spaces
    )
    reverse = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*reverse, decoders.Strip(" ", 1, 0)] if adds_space else reverse
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.text, special=True, normalized=False)
            for piece in pieces
            if piece.kind == CONTROL or piece.text in control
        ]
    )
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"],
            pair=[*prefix, "$A", *prefix, "$B:1"],
            special_tokens=[(text, ids[text]) for text in dict.fromkeys(prefix)],
        )
    text: str = tokenizer.to_str(pretty=True)
    return text.encode()


def _merges(pieces: Sequence[SentencePiecePiece]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model: every split of a normal piece into two, the best first.

    SentencePiece merges the neighbours whose piece has the highest score, in whatever way that
    piece came about.
    """
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    found = [
        (-piece.score, token_id, at, (piece.text[:at], piece.text[at:]))
        for token_id, piece in enumerate(pieces)
        if piece.kind == NORMAL
        for at in range(1, len(piece.text))
        if piece.text[:at] in normal and piece.text[at:] in normal
    ]
    return [merge for *_, merge in sorted(found)]


def _check_pieces(pieces: Sequence[SentencePiecePiece], control: Collection[str]) -> None:
    """Refuse pieces that the library would not treat alike."""
    for kind, name in ((USER_DEFINED, "user-defined"), (UNUSED, "unused")):
        found = [each.text for each in pieces if each.kind == kind and each.text not in control]
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(f"it has {name} pieces ({', '.join(map(repr, found[:_SHOWN]))}{more})")


def _check_settings(model: bytes) -> bool:
    """Return whether the model puts a space before a text; refuse settings that cannot be kept."""
    trainer, normalizer = _settings(model, _TRAINER), _settings(model, _NORMALIZER)
    kind = trainer.get(_MODEL_TYPE, 1)
    if kind != _BPE:
        raise ValueError(f"it is a model of {_MODEL_TYPES.get(kind, f'type {kind}')}, not of BPE")
    if not trainer.get(_BYTE_FALLBACK, 0):
        raise ValueError("it has no byte fallback")
    if trainer.get(_SUFFIX, 0):
        raise ValueError("it has spaces at the end of words (treat_whitespace_as_suffix)")
    for part, name in ((normalizer, "normalises"), (_settings(model, _DENORMALIZER), "restores")):
        if part.get(_CHARACTER_MAP, 0):
            raise ValueError(f"it {name} characters, as NFKC does")
    if normalizer.get(_REMOVE_SPACES, 1):
        raise ValueError("it removes repeated spaces (remove_extra_whitespaces)")
    if not normalizer.get(_ESCAPE, 1):
        raise ValueError("it keeps spaces as they are (escape_whitespaces is off)")
    return bool(normalizer.get(_PREFIX, 1))


def _settings(model: bytes, part: int) -> dict[int, int]:
    """Return the integers of a part by field number, and the lengths of its strings."""
    return {
        number: read_varint(model, start, stop)[0] if wire_type == VARINT else stop - start
        for found, kind, begin, end in message_fields(model, 0, len(model))
        if (found, kind) == (part, SIZED)
        for number, wire_type, start, stop in message_fields(model, begin, end)
    }
