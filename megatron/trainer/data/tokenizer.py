"""Reads tokenizers behind one interface, from files that hold data, not code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.bounded_read import read_small

END_OF_DOCUMENT = "<|endoftext|>"
"""The piece that separates documents, in our own tokenizers and in OLMoE's."""

_MOST_BYTES = 1 << 28
_LARGEST_ID = (1 << 31) - 1
"""Of a token in a token file."""


class Tokenizer(Protocol):
    """Declares what the tools and the trainer ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest id."""

    @property
    def eod(self) -> int:
        """Return the id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a special piece is ordinary text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


class SentencePieceTokenizer:
    """Reads a SentencePiece .model; documents end with `<|endoftext|>`, or `</s>` without it.

    Args:
        path: The .model file.

    Raises:
        DataError: The file cannot be read, or has neither piece.
    """

    def __init__(self, path: str) -> None:
        self._processor = SentencePieceProcessor()
        data = _read(path)
        with _reading(path, "a SentencePiece model"):
            self._processor.LoadFromSerializedProto(data)
        piece_id = self._processor.PieceToId(END_OF_DOCUMENT)
        eod = piece_id if self._processor.IsControl(piece_id) else self._processor.eos_id()
        if eod < 0:
            raise DataError(
                f"{path} has neither a control piece {END_OF_DOCUMENT!r} nor an end of sentence;"
                " documents must end with one; train the tokenizer with tools/train_tokenizer.py"
            )
        self.eod: int = eod
        self.vocab_size: int = self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a special piece is ordinary text."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        text: str = self._processor.DecodeIds(ids)
        return text


_JSON_KIND = "a tokenizers JSON file"


class HFTokenizer:
    """Reads a tokenizer.json of the `tokenizers` library; documents end with `<|endoftext|>`.

    Args:
        path: The .json file.

    Raises:
        DataError: The file cannot be read, or has no `<|endoftext|>`.
    """

    def __init__(self, path: str) -> None:
        data = _read(path)
        self._path = path
        with _reading(path, _JSON_KIND):
            self._tokenizer = TokenizersTokenizer.from_buffer(data)
        eod = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        if eod is None:
            raise DataError(
                f"{path} has no token {END_OF_DOCUMENT!r}; documents must end with it; train the"
                " tokenizer with tools/train_tokenizer.py or add the token"
            )
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod: int = eod
        largest = max(self._tokenizer.get_vocab().values())
        if largest > _LARGEST_ID:
            raise DataError(
                f"{path} has the id {largest}; ids must be at most {_LARGEST_ID}, as token files"
                " store them; restore the file"
            )
        self.vocab_size: int = largest + 1

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a special piece is ordinary text."""
        with _reading(self._path, _JSON_KIND):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        with _reading(self._path, _JSON_KIND):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


TOKENIZERS: dict[str, type[SentencePieceTokenizer] | type[HFTokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HFTokenizer": HFTokenizer,
}
"""Values of --tokenizer-type."""


def load_tokenizer(tokenizer_type: str, tokenizer_model: str | None) -> Tokenizer:
    """Read a tokenizer.

    Args:
        tokenizer_type: A name in TOKENIZERS.
        tokenizer_model: Its file.

    Raises:
        ConfigError: The type is unknown, or no file is named.
        DataError: The file is missing or of another kind.
    """
    if tokenizer_type not in TOKENIZERS:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} is unknown; it must be one of"
            f" {', '.join(TOKENIZERS)}"
        )
    if not tokenizer_model:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} needs a file, but --tokenizer-model is not given;"
            " name the .model or .json file"
        )
    return TOKENIZERS[tokenizer_type](tokenizer_model)


def _read(path: str) -> bytes:
    """Return a tokenizer file's content, or raise DataError when it is missing."""
    if not Path(path).is_file():
        raise DataError(
            f"tokenizer {path} does not exist or is not a file; --tokenizer-model must name the"
            " .model or .json file; check the path"
        )
    try:
        return read_small(Path(path), most_bytes=_MOST_BYTES)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read: {error.strerror}; --tokenizer-model must name the"
            " .model or .json file; check the path"
        ) from error


@contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    """Turn what the libraries say of a damaged file, or of one of another kind, into a DataError.

    They raise Exception itself, and the one that is written in Rust, where it gives up, a
    PanicException of its own that is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"tokenizer {path} is not {kind} ({error}); --tokenizer-type and --tokenizer-model must"
            f" agree ({', '.join(TOKENIZERS)}); choose the other type or restore the file"
        ) from error
