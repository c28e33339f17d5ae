"""Reads SentencePiece models."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron.trainer.data.document_end import (
    END_OF_DOCUMENT,
    DocumentEnd,
    choose_end,
    is_marker,
)
from megatron.trainer.data.encoding import (
    Encoding,
    Ids,
    Span,
    encode_between,
    find_spelled,
    overlaps,
    widened,
)
from megatron.trainer.data.sentencepiece_pieces import (
    BYTE,
    CONTROL,
    USER_DEFINED,
    as_control,
    read_pieces,
)
from megatron.trainer.data.sentencepiece_words import make_word_encoder
from megatron.trainer.data.tokenizer_files import (
    TokenizerSettings,
    read_settings,
    read_tokenizer_file,
    reading,
)
from megatron.trainer.data.word_cache import WordCache
from megatron.trainer.errors import DataError

_KIND_NAME = "a SentencePiece model"
_SPACE = "\u2581"
"""How a piece writes a space."""
_CLASSES_THAT_ADD_BOS = ("Llama", "CodeLlama", "Gemma")
"""Beginnings of the names of transformers' classes that put a BOS first unless told otherwise."""


class SentencePieceTokenizer:
    """Reads a SentencePiece .model, and the settings beside it.

    No text becomes a control piece, nor a user-defined piece that is written like `<|im_end|>`,
    ends documents, or is named by the settings; other user-defined pieces are vocabulary.

    Args:
        path: The .model file.
        eod_token: The piece that ends a document; None takes the one that `choose_end` finds.

    Raises:
        DataError: A file cannot be read, or nothing names a piece that ends documents.
    """

    def __init__(self, path: str, *, eod_token: str | None = None) -> None:
        data = read_tokenizer_file(path)
        self._load(path, data)
        settings = read_settings(Path(path).parent)
        with reading(path, _KIND_NAME):
            pieces = read_pieces(data)
        self._texts = [piece.text for piece in pieces]
        self._ids = {text: token_id for token_id, text in enumerate(self._texts)}
        self._control = {piece.text for piece in pieces if piece.kind == CONTROL}
        self._bytes = {piece.text for piece in pieces if piece.kind == BYTE}
        self._defined = {piece.text for piece in pieces if piece.kind == USER_DEFINED}
        own = self._own_end(path)
        self.end: DocumentEnd = choose_end(self, settings, path=path, eod_token=eod_token, own=own)
        self.eod: int = self.end.token_id
        special = {self.end.text, *settings.special_texts(), *self._named_by_model()}
        placed = {text for text in self._defined if text in special or is_marker(text)}
        if placed:
            self._load(path, as_control(data, placed))
            self._control |= placed
        self.prefix: tuple[int, ...] = self._find_prefix(settings)
        self.vocab_size: int = len(self._texts)

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a control piece is ordinary text."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a text that begins a document: `prefix`, then the text's."""
        ids = self.encode(text)
        return [*self.prefix, *ids] if ids else ids

    def encode_written(self, text: str, as_text: Sequence[Span] = ()) -> Encoding:
        """Return the tokens of a text in which control pieces are written, without a `prefix`.

        Args:
            text: What a template made.
            as_text: Where in it control pieces are only spelled, and are ordinary text.
        """
        placed = [
            (self._ids[written], span)
            for written, span in find_spelled(text, self.control_texts())
            if not overlaps(span, as_text)
        ]
        return encode_between(text, placed, self._encode_stretch)

    def _encode_stretch(self, text: str, _: int) -> tuple[list[int], list[Span]]:
        found = self._processor.EncodeAsOffsetMapping(text)
        return found["ids"], widened(found["offsets"])

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Return what `encode_document` does for each text.

        Where the model allows it, words that were seen before are not encoded again.
        """
        words = self._word_encoder
        found = words.encode(texts) if words else [*map(self._processor.EncodeAsNumpy, texts)]
        if not self.prefix:
            return found
        return [np.concatenate([self.prefix, ids]) if ids.size else ids for ids in found]

    @cached_property
    def _word_encoder(self) -> WordCache | None:
        return make_word_encoder(self._processor)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; control pieces have none."""
        text: str = self._processor.DecodeIds(ids)
        return text

    def num_bytes(self, token_id: int) -> int:
        """Return the UTF-8 bytes of the text that a piece stands for; 0 for a control piece."""
        text = self.token_text(token_id)
        if text is None or text in self._control:
            return 0
        return 1 if text in self._bytes else len(text.replace(_SPACE, " ").encode())

    def token_id(self, text: str) -> int | None:
        """Return the id of the piece that is written `text`; None for none."""
        return self._ids.get(text)

    def token_text(self, token_id: int) -> str | None:
        """Return how a piece is written; None for an id that is none."""
        return self._texts[token_id] if 0 <= token_id < len(self._texts) else None

    def can_be_text(self, token_id: int) -> bool:
        """Return whether ordinary text can become this piece, if it does not end documents."""
        return self.token_text(token_id) not in self._control | self._defined

    def control_texts(self) -> list[str]:
        """Return the pieces that no text becomes."""
        return sorted(self._control)

    def _load(self, path: str, data: bytes) -> None:
        self._processor = SentencePieceProcessor()
        with reading(path, _KIND_NAME):
            self._processor.LoadFromSerializedProto(data)

    def _own_end(self, path: str) -> tuple[int, str] | None:
        """Return the end that the model itself names."""
        piece_id = self.token_id(END_OF_DOCUMENT)
        if piece_id is not None and not self.can_be_text(piece_id):
            return piece_id, f"a control piece of {path}"
        if self._processor.eos_id() >= 0:
            return self._processor.eos_id(), f"the end of sentence of {path}"
        return None

    def _named_by_model(self) -> set[str]:
        """Return the pieces that the model names as begin, end and padding."""
        ids = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        return {self._texts[each] for each in ids if each >= 0}

    def _find_prefix(self, settings: TokenizerSettings) -> tuple[int, ...]:
        """Return what the settings put before each text; a model alone puts nothing there."""
        is_default = (settings.tokenizer_class or "").startswith(_CLASSES_THAT_ADD_BOS)
        if not (is_default if settings.adds_bos is None else settings.adds_bos):
            return ()
        named = settings.named_text("bos")
        bos = self._processor.bos_id() if named is None else self.token_id(named[1])
        if bos is None or bos < 0:
            raise DataError(
                f"{settings.directory / 'tokenizer_config.json'} puts a BOS before each text, but"
                f" {'the model has none' if named is None else f'{named[1]!r} is no piece'}; set"
                " add_bos_token to false there, or restore the files"
            )
        return (bos,)
