"""Tells a token file from others of its size, without reading all of it.

A fingerprint is the SHA-256 of the whole .idx, which holds the length of every document, and of 64
blocks of 16,384 tokens, evenly spaced from the first token to the last; the path and times of the
file do not count. A change of tokens alone that lies between the blocks is not noticed; 2^20 tokens
and fewer are hashed whole. Checkpoints and manifests keep it, so what it is must not change.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.trainer.io.hashing import add_file

_NUM_BLOCKS = 64
_BLOCK_TOKENS = 1 << 14
_VERSION = b"token file, fingerprint 1\n"


def fingerprint(index: Path, tokens: npt.NDArray[np.integer]) -> str:
    """Return the fingerprint of a token file that is not being verified.

    Args:
        index: The .idx.
        tokens: [num_tokens] the .bin.
    """
    digest = start_fingerprint()
    with open(index, "rb") as file:
        add_file(digest, file)
    return finish_fingerprint(digest, tokens)


def start_fingerprint() -> "hashlib._Hash":
    """Return a digest that every byte of the .idx is to be added to."""
    return hashlib.sha256(_VERSION)


def finish_fingerprint(digest: "hashlib._Hash", tokens: npt.NDArray[np.integer]) -> str:
    """Return the fingerprint of a token file.

    Args:
        digest: Of the whole .idx.
        tokens: [num_tokens] the .bin.
    """
    last = max(0, len(tokens) - _BLOCK_TOKENS)
    for start in np.unique(np.linspace(0, last, _NUM_BLOCKS).astype(np.int64)).tolist():
        digest.update(tokens[start : start + _BLOCK_TOKENS].tobytes())
    return digest.hexdigest()
