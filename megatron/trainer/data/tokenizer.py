"""Tokenizers behind one interface, read from files that hold data, not code."""

from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.errors import ConfigError, DataError

END_OF_DOCUMENT = "<|endoftext|>"
"""The piece that separates documents, in our own tokenizers and in OLMoE's."""


class Tokenizer(Protocol):
    """What the tools and the trainer ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """Id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a special piece is ordinary text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


class SentencePieceTokenizer:
    """A SentencePiece .model; documents end with `<|endoftext|>`, or `</s>` where that is missing.

    Args:
        path: The .model file.

    Raises:
        DataError: The file cannot be read, or has neither piece.
    """

    def __init__(self, path: str) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_read(path))
        except RuntimeError as error:
            raise _unreadable(path, "a SentencePiece model", error) from error
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


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library; documents end with `<|endoftext|>`.

    Args:
        path: The .json file.

    Raises:
        DataError: The file cannot be read, or has no `<|endoftext|>`.
    """

    def __init__(self, path: str) -> None:
        data = _read(path)
        try:
            self._tokenizer = TokenizersTokenizer.from_buffer(data)
        except Exception as error:  # the library raises Exception itself
            raise _unreadable(path, "a tokenizers JSON file", error) from error
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
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a special piece is ordinary text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
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
    return Path(path).read_bytes()


def _unreadable(path: str, kind: str, error: Exception) -> DataError:
    """Return the error for a tokenizer file of another kind, or damaged."""
    return DataError(
        f"tokenizer {path} is not {kind} ({error}); --tokenizer-type and --tokenizer-model must"
        f" agree ({', '.join(TOKENIZERS)}); choose the other type or restore the file"
    )
