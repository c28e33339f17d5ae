"""Encodes texts of a byte-level tokenizers file word by word, where whole texts have the same ids.

Its regular expression, GPT-2's, lets white space only begin a word: a visible character and the
white space after it are never of one word, and no word depends on what is before it. So a text may
be cut there, unless an added token reaches across or looks at its neighbours.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.data.encoding import Ids
from megatron.trainer.data.word_cache import WordCache

_PATTERN = r"[ \n]*[^ \n]*(?:(?<![!-~])[ \n]+[^ \n]*)*"
"""White space, and what follows up to white space that a visible ASCII character is before."""
_CUT = re.compile(r"[!-~][ \n]")


def make_hf_word_cache(
    tokenizer: TokenizersTokenizer, encode_text: Callable[[str], Ids], *, vocab_size: int
) -> WordCache | None:
    """Return an encoder by words that gives what a file gives; None where it cannot be known to.

    Args:
        tokenizer: What the file holds.
        encode_text: Gives the ids of a whole text.
        vocab_size: Every id is below it.
    """
    if not _may_be_cut(json.loads(tokenizer.to_str())):
        return None

    def made() -> WordCache:
        return WordCache(
            _PATTERN,
            encode_words=lambda words: map(encode_text, words),
            encode_text=encode_text,
            vocab_size=vocab_size,
        )

    return made() if _agree(made(), encode_text, tokenizer) else None


def _may_be_cut(file: dict[str, Any]) -> bool:
    """Return whether a tokenizers file has GPT-2's words and nothing that crosses them."""
    words, normalizer = file["pre_tokenizer"] or {}, file["normalizer"] or {}
    is_plain = (
        words.get("type") == "ByteLevel"
        and words.get("use_regex", True)
        and not words.get("add_prefix_space", True)
        and normalizer.get("type", "NFC") == "NFC"
        and not file["model"].get("dropout")
    )
    return bool(is_plain) and not any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or _CUT.search(token["content"])
        for token in file["added_tokens"]
    )


def _agree(
    cache: WordCache, encode_text: Callable[[str], Ids], tokenizer: TokenizersTokenizer
) -> bool:
    """Return whether texts made to try it have the same ids by words as whole."""
    step = max(1, tokenizer.get_vocab_size() // 400)
    some = [tokenizer.decode([each]) for each in range(0, tokenizer.get_vocab_size(), step)]
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    odd = [
        "",
        " ",
        "\n\n ",
        "a \u0301b\n\u0338",
        "x =  [1,\n\t 2]\r\n",
        "don't  'tis",
        "\u00a0 é  \n日本 \x1f b",
    ]
    texts = [
        *odd,
        " ".join(some),
        "\n".join(some),
        "".join(some),
        " ".join(odd),
        " a\n".join(added),
    ]
    return all(
        np.array_equal(ids, encode_text(text))
        for text, ids in zip(texts, cache.encode(texts), strict=True)
    )
