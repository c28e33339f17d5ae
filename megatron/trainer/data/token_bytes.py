"""Counts the bytes of text that each token stands for."""

import numpy as np

from megatron.trainer.data.encoding import Ids
from megatron.trainer.data.tokenizer import Tokenizer


def count_token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Ids:
    """Return [vocab_size] the UTF-8 bytes of each token's text; 0 where a token has none.

    Their sum over a text's tokens is the text's size, but for what the tokenizer itself puts before
    a text (a SentencePiece model with a dummy prefix counts its space).
    """
    found = np.zeros(vocab_size, np.int32)
    for token_id in range(min(vocab_size, tokenizer.vocab_size)):
        found[token_id] = tokenizer.num_bytes(token_id)
    return found
