"""Computes the loss of a model that knows only how often each token occurs, to compare with."""

import numpy as np
import numpy.typing as npt

_CHUNK_TOKENS = 1 << 24


def unigram_entropy(counts: npt.NDArray[np.integer]) -> float:
    """Return the entropy of token frequencies.

    Args:
        counts: [v] how often each id occurs, not all 0.

    Returns:
        Nats per token: the least mean cross entropy of any prediction that ignores the context.

    Raises:
        ValueError: The counts add up to 0.
    """
    total = int(counts.sum())
    if total <= 0:
        raise ValueError(f"counts add up to {total}; there must be at least one token")
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def token_counts(
    tokens: npt.NDArray[np.integer], *, start_token: int, stop_token: int, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Count each id in a range of tokens.

    Args:
        tokens: [num_tokens] ids, each 0 to vocab_size - 1; a memory map is read in pieces.
        start_token: First token of the range.
        stop_token: One past its last.
        vocab_size: Length of the result (v).

    Returns:
        [v] int64 counts.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)  # [v]
    for start in range(start_token, stop_token, _CHUNK_TOKENS):
        chunk = tokens[start : min(start + _CHUNK_TOKENS, stop_token)]
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts
