"""Scores the first documents of validation sets whole, in windows of the model's length."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.source import Source, WindowSource
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.scoring import Continuation
from megatron.trainer.records.losses import BITS_PER_BYTE, PERPLEXITY, perplexity


@dataclass(frozen=True, kw_only=True)
class DocumentRows:
    """Says which rows are a document's windows, and what their sum is divided by."""

    rows: slice
    """Among all rows of an evaluation."""
    num_tokens: int
    """Tokens that are scored."""
    num_bytes: int
    """UTF-8 bytes of its text."""


def add_documents(
    rows: list[Continuation],
    validation: Mapping[str, ValidationSet],
    tokenizer: Tokenizer,
    *,
    limit: int,
    max_length: int,
) -> dict[str, tuple[DocumentRows, ...]]:
    """Cut the first documents of each set into windows, and add these to the rows.

    Args:
        rows: of an evaluation; changed in place.
        validation: the sets.
        tokenizer: that made them.
        limit: documents of each set.
        max_length: positions of a row.

    Returns:
        The documents of each set.

    Raises:
        ConfigError: a set is not of documents.
    """
    found = {}
    for name, each in validation.items():
        documents = []
        for ids in islice(_texts(name, each.source, tokenizer), limit):
            windows = rolling_windows(ids, max_length=max_length)
            size = len(tokenizer.decode(list(ids[1:])).encode())
            rows += windows
            documents.append(
                DocumentRows(
                    rows=slice(len(rows) - len(windows), len(rows)),
                    num_tokens=len(ids) - 1,
                    num_bytes=size,
                )
            )
        found[name] = tuple(documents)
    return found


def _texts(name: str, source: Source, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Yield the documents of a set that have text: what stands before it, and its tokens.

    The token that ends a document is not of its text; it, or a BOS, is what the text follows.
    """
    if not isinstance(source, WindowSource) or source.prefix is None:
        raise ConfigError(
            f"--eval-documents scores documents of token files, but validation set {name!r} has"
            " none; drop the flag"
        )
    starts = open_tokens(source.prefix, verified=source.facts).document_starts
    first = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eod
    begin, end = (starts.first_from(each) for each in (source.start_token, source.stop_token))
    for number in range(begin, end):
        span = slice(starts.bound(number), min(starts.bound(number + 1), source.stop_token))
        ids = np.asarray(source.tokens[span]).tolist()
        ids = ids[:-1] if ids[-1:] == [tokenizer.eod] else ids
        ids = ids[1:] if tokenizer.prefix and ids[:1] == [first] else ids
        if ids:
            yield (first, *ids)


def rolling_windows(ids: Sequence[int], *, max_length: int) -> list[Continuation]:
    """Cut a text into windows that score each token once, all but the first.

    As lm-evaluation-harness does it: windows follow each other with one token before them; the last
    one has as many tokens before those that it scores as the model takes.
    """
    windows = []
    for start in range(1, len(ids), max_length):
        stop = min(start + max_length, len(ids))
        row = ids[max(0, stop - max_length - 1) : stop]
        windows.append(Continuation(ids=tuple(row), count=stop - start))
    return windows


def score_documents(
    documents: Sequence[DocumentRows], log_probs: Sequence[float]
) -> dict[str, float | int]:
    """Return the figures of a set's documents, each one counting the same.

    Args:
        documents: of the set.
        log_probs: of all rows, nats.
    """
    nats = [-math.fsum(log_probs[each.rows]) for each in documents]
    losses = [total / each.num_tokens for total, each in zip(nats, documents, strict=True)]
    bits = [
        total / math.log(2) / each.num_bytes if each.num_bytes else math.nan
        for total, each in zip(nats, documents, strict=True)
    ]
    loss = float(np.mean(losses)) if losses else math.nan
    return {
        "documents": len(documents),
        "loss": loss,
        PERPLEXITY: perplexity(loss),
        BITS_PER_BYTE: float(np.mean(bits)) if bits else math.nan,
    }


def document_record(
    documents: Mapping[str, Sequence[DocumentRows]], log_probs: Sequence[float]
) -> dict[str, Any]:
    """Make the documents' part of an evaluation's record; docs/run_directory.md defines it."""
    return {name: score_documents(each, log_probs) for name, each in documents.items()}
