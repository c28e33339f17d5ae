"""Compares the trainer's tokenizer with the one that others build from exported files.

Ids and decoded text must be equal. Our `encode` takes text that spells a control token for ordinary
text, whereas transformers parses it, unless told `split_special_tokens`; so both are told here.
Tokens that are added but not marked special are parsed even then: texts that spell one that we take
for a control token are counted apart.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersTokenizer

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from moe_app.convert.tokenizer_samples import sample_texts

logger = logging.getLogger("convert")

_MOST_TOKENS = 50
"""Control tokens whose spelling is compared: some tokenizers have hundreds of a kind."""
_SHOWN_CHARACTERS = 40
_SHOWN_IDS = 12


@dataclass(frozen=True, kw_only=True)
class TokenizerComparison:
    """Counts on how many texts two tokenizers agree."""

    num_texts: int
    """Texts that were compared."""
    num_equal: int
    """Of these, with equal ids and equal decoded text."""
    num_parsed: int
    """Further texts, which spell a token that the other one always parses."""
    difference: str | None
    """The first one, in words; None for none."""

    @property
    def is_equal(self) -> bool:
        """Return whether they agree on all texts."""
        return self.num_equal == self.num_texts

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        found: dict[str, Any] = {"num_texts": self.num_texts, "num_equal": self.num_equal}
        if self.num_parsed:
            found["num_texts_with_tokens_that_are_parsed"] = self.num_parsed
        return found | ({"first_difference": self.difference} if self.difference else {})


def compare_with_file(ours: Tokenizer, tokenizer_json: bytes) -> TokenizerComparison:
    """Compare with the `tokenizers` library, which reads a tokenizer.json.

    Raises:
        DataError: the library cannot read it.
    """
    theirs = TokenizersTokenizer.from_buffer(tokenizer_json)
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    return _compare(
        ours,
        lambda text: list(theirs.encode(text, add_special_tokens=False).ids),
        lambda ids: str(theirs.decode(ids, skip_special_tokens=False)),
        parsed=_parsed_tokens(ours, theirs),
    )


def compare_with_transformers(ours: Tokenizer, directory: Path, num_rows: int) -> dict[str, Any]:
    """Compare with the tokenizer that AutoTokenizer makes from an exported directory.

    Args:
        ours: the trainer's.
        directory: the exported one; no code in it is run.
        num_rows: of the model's embedding.

    Returns:
        What was compared, and the outcome, ready for JSON; `passed` is the verdict.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        found = _compare_built(ours, theirs, num_rows)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        found = {"passed": False, "problem": f"transformers cannot build it: {error}"}
    log = logger.info if found["passed"] else logger.error
    log("AutoTokenizer of %s %s: %s", directory, "agrees" if found["passed"] else "DIFFERS", found)
    return found


def _compare_built(ours: Tokenizer, theirs: Any, num_rows: int) -> dict[str, Any]:
    backend = getattr(theirs, "backend_tokenizer", None)
    comparison = _compare(
        ours,
        lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True),
        lambda ids: theirs.decode(ids, skip_special_tokens=False),
        parsed=[] if backend is None else _parsed_tokens(ours, backend),
    )
    found = {"class": type(theirs).__name__, **comparison.report()}
    largest = max(theirs.get_vocab().values())
    begun = theirs.encode("a")
    problems: list[str] = []
    if not comparison.is_equal:
        problems.append(str(comparison.difference))
    if largest >= num_rows:
        problems.append(f"it has the id {largest}, but the embedding has {num_rows} rows")
    expected = ours.encode_document("a")
    if begun[: len(expected)] != expected:
        problems.append(
            f"it begins the ids of 'a', {begun}, otherwise than the trainer: {expected}"
        )
    if theirs.eos_token is None:
        problems.append("it has no eos_token")
    return found | {"passed": not problems} | ({"problem": "; ".join(problems)} if problems else {})


def _compare(
    ours: Tokenizer,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    *,
    parsed: Sequence[str],
) -> TokenizerComparison:
    num_texts = num_equal = num_parsed = 0
    first = None
    for text in sample_texts(ours.control_texts()[:_MOST_TOKENS]):
        if any(token in text for token in parsed):
            num_parsed += 1
            continue
        try:
            expected = ours.encode(text)
        except DataError:  # it spells a control token that is a word of the model
            num_parsed += 1
            continue
        num_texts += 1
        found = encode(text)
        written, read = ours.decode(expected), decode(expected)
        if found == expected and written == read:
            num_equal += 1
        elif first is None:
            first = _describe(text, found, expected, read, written)
    return TokenizerComparison(
        num_texts=num_texts, num_equal=num_equal, num_parsed=num_parsed, difference=first
    )


def _parsed_tokens(ours: Tokenizer, theirs: TokenizersTokenizer) -> list[str]:
    """Return the control tokens of ours that the other one parses, whatever it is told."""
    added = {token.content: token.special for token in theirs.get_added_tokens_decoder().values()}
    return [text for text in ours.control_texts() if added.get(text) is False]


def _describe(text: str, found: list[int], expected: list[int], read: str, written: str) -> str:
    shown = repr(text[:_SHOWN_CHARACTERS]) + ("..." if len(text) > _SHOWN_CHARACTERS else "")
    if found != expected:
        return f"{shown} becomes {_short(found)} instead of {_short(expected)}"
    return f"the ids of {shown} are read as {read[:_SHOWN_CHARACTERS]!r} instead of " + repr(
        written[:_SHOWN_CHARACTERS]
    )


def _short(ids: Sequence[int]) -> str:
    more = len(ids) - _SHOWN_IDS
    return f"{list(ids[:_SHOWN_IDS])}" + (f" and {more} more" if more > 0 else "")
