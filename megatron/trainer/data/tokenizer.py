"""Reads tokenizers behind one interface, from files that hold data, not code."""

import logging
from collections.abc import Sequence
from typing import Protocol

from megatron.trainer.data.document_end import END_OF_DOCUMENT, DocumentEnd
from megatron.trainer.data.encoding import Encoding, Ids, Span
from megatron.trainer.data.hf_tokenizer import HFTokenizer
from megatron.trainer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron.trainer.data.tokenizer_files import TYPE_ALIASES, locate_tokenizer
from megatron.trainer.errors import ConfigError

__all__ = [
    "END_OF_DOCUMENT",
    "TOKENIZERS",
    "TOKENIZER_CHOICES",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_embedding",
    "describe_ends",
    "load_tokenizer",
]

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Declares what the tools and the trainer ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest id."""

    @property
    def end(self) -> DocumentEnd:
        """Return the token that ends a document, and who says so."""

    @property
    def eod(self) -> int:
        """Return the id that ends a document."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Return the ids that the tokenizer puts before each text: its BOS, or none."""

    def encode(self, text: str) -> list[int]:
        """Return text's ids; text that spells a control token is ordinary text."""

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a text that begins a document: `prefix`, then the text's.

        Empty for an empty text.
        """

    def encode_written(self, text: str, as_text: Sequence[Span] = ()) -> Encoding:
        """Return the tokens of a text in which control tokens are written, without a `prefix`.

        Args:
            text: What a template made.
            as_text: Where in it control tokens are only spelled, and are ordinary text.
        """

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """Return what `encode_document` does for each text, in less time."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without a `prefix` at their beginning."""

    def num_bytes(self, token_id: int) -> int:
        """Return the UTF-8 bytes of the text that a token stands for; 0 for a control token."""

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is written `text`; None for none."""

    def token_text(self, token_id: int) -> str | None:
        """Return how a token is written; None for an id that is none."""

    def control_texts(self) -> list[str]:
        """Return the tokens that no text becomes."""


TOKENIZERS: dict[str, type[SentencePieceTokenizer] | type[HFTokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HFTokenizer": HFTokenizer,
}
"""Types of tokenizers."""
TOKENIZER_CHOICES = (*TOKENIZERS, *TYPE_ALIASES)
"""Values of --tokenizer-type."""


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None, *, eod_token: str | None = None
) -> Tokenizer:
    """Read a tokenizer, and log which token ends a document.

    Args:
        tokenizer_type: A name in TOKENIZER_CHOICES.
        tokenizer_model: Its file, or a directory that holds it as tokenizer.json or
            tokenizer.model.
        eod_token: The token that ends a document; None takes the one that `choose_end` finds.

    Raises:
        ConfigError: The type is unknown, or no file is named.
        DataError: The file is missing or of another kind, or nothing names the end of a document.
    """
    file = locate_tokenizer(tokenizer_type, tokenizer_model)
    tokenizer = TOKENIZERS[file.kind](str(file.path), eod_token=eod_token)
    logger.info(describe_ends(tokenizer))
    return tokenizer


def check_embedding(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model has an embedding for every id of its tokenizer.

    Raises:
        ConfigError: It has not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is"
            f" {vocab_size}; every id needs an embedding; name the tokenizer that made"
            " the training data with --tokenizer-model"
        )


def describe_ends(tokenizer: Tokenizer) -> str:
    """Return a line about the tokens that the program places: the end of a document, and a BOS."""
    starts = " ".join(repr(tokenizer.token_text(each)) for each in tokenizer.prefix)
    return f"{tokenizer.end}{f'; texts begin with {starts}' if starts else ''}"
