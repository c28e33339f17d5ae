"""Decides where a continuation ends: at a token, or at a text that the tokens spell."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.tokenizer_files import read_settings
from megatron.trainer.errors import ConfigError
from moe_app.command_line import argument_text

logger = logging.getLogger("generate")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Describes how a continuation ended."""

    reason: int | str | None
    """The token or the text it stopped at; None at the limit."""
    description: str
    """The same for the log."""
    prompt: str
    """The text of the prompt, without a character that it only begins."""
    text: str
    """What was added to it, without what it stopped at."""


@dataclass(frozen=True, kw_only=True)
class Stops:
    """Holds what ends a continuation; the same on every rank, so that all decide alike."""

    ids: Mapping[int, str]
    """Tokens, with a description of each for the log."""
    texts: tuple[str, ...] = ()
    """Texts, in the order of the command line."""
    tokenizer: Tokenizer | None = None
    """Decodes tokens where there are texts to look for."""

    def ends(self, prompt: list[int], new: list[int]) -> bool:
        """Return whether the text of new tokens holds one of the texts."""
        if not self.texts or self.tokenizer is None:
            return False
        return self._first_text(split_text(self.tokenizer, prompt, new)[1]) is not None

    def find(self, tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> Ending:
        """Return how the continuation `new` of a prompt ended."""
        if new and new[-1] in self.ids:
            before, text = split_text(tokenizer, prompt, new[:-1])
            reason, description = new[-1], self.ids[new[-1]]
            return Ending(reason=reason, description=description, prompt=before, text=text)
        before, text = split_text(tokenizer, prompt, new)
        first = self._first_text(text)
        if first is None:
            return Ending(reason=None, description="the limit", prompt=before, text=text)
        kept = text[: text.index(first)]
        return Ending(reason=first, description=f"the text {first!r}", prompt=before, text=kept)

    def _first_text(self, text: str) -> str | None:
        """Return the text to stop at that begins first; None where there is none."""
        found = [(text.index(each), each) for each in self.texts if each in text]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def split_text(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> tuple[str, str]:
    """Return the text of a prompt, and what new tokens add to it; together the text of all.

    Tokens are decoded together with the prompt, on which their text may depend. Where the prompt
    ends inside a character, decoding it alone gives a replacement for it, which the text of all
    lacks: that character belongs to what was added.
    """
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode(prompt + new)
    border = len(before)
    if not whole.startswith(before):
        pairs = enumerate(zip(before, whole, strict=False))
        border = next((i for i, (a, b) in pairs if a != b), len(whole))
    return whole[:border], whole[border:]


def add_stop_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for where a continuation ends."""
    stop = parser.add_argument_group(
        "stop", "The end of a document and the model's eos_token_id stop a text in any case."
    )
    stop.add_argument(
        "--stop",
        nargs="+",
        action="extend",
        default=[],
        type=argument_text,
        metavar="TEXT",
        help="end before any of these texts, wherever tokens begin and end",
    )
    stop.add_argument(
        "--stop-token-id",
        nargs="+",
        action="extend",
        default=[],
        type=int,
        metavar="ID",
        help="end at any of these tokens",
    )


def collect_stops(
    args: argparse.Namespace, tokenizer: Tokenizer, checkpoint: Path, *, turn_end: int | None = None
) -> Stops:
    """Return what ends a continuation; on rank 0, which reads the files.

    These are the end of a document, what the files in the checkpoint name as `eos_token` and
    `eos_token_id`, what ends an answer in a conversation, and what the command line adds.

    Raises:
        ConfigError: `--stop` or `--stop-token-id` is invalid.
        DataError: A file in the checkpoint cannot be read.
    """
    ids = {tokenizer.eod: "the end of the document"}
    settings = read_settings(checkpoint)
    sources = [(f"the eos_token_id of {name}", each) for name, each in settings.named_ids("eos")]
    named = settings.named_text("eos")
    if named is not None and (token_id := tokenizer.token_id(named[1])) is not None:
        sources.append((f"the eos_token of {named[0]}", token_id))
    if turn_end is not None:
        sources.append(("which ends an answer", turn_end))
    sources += [("--stop-token-id", _checked_id(each, tokenizer)) for each in args.stop_token_id]
    for source, token_id in sources:
        if token_id >= tokenizer.vocab_size:
            logger.info("%s, %d, is no token of the tokenizer", source, token_id)
            continue
        ids.setdefault(token_id, f"{tokenizer.token_text(token_id)!r} (id {token_id}), {source}")
    texts = tuple(_checked_text(text) for text in args.stop)
    if texts or len(ids) > 1:
        logger.info("texts end at %s", "; ".join([*ids.values(), *map(repr, texts)]))
    return Stops(ids=ids, texts=texts, tokenizer=tokenizer if texts else None)


def _checked_id(token_id: int, tokenizer: Tokenizer) -> int:
    if not 0 <= token_id < tokenizer.vocab_size:
        raise ConfigError(
            f"--stop-token-id is {token_id}; the tokenizer has the ids 0 to"
            f" {tokenizer.vocab_size - 1}; name one of these, or a text with --stop"
        )
    return token_id


def _checked_text(text: str) -> str:
    if not text:
        raise ConfigError(
            "--stop is ''; an empty text is everywhere; leave it out or name another one"
        )
    check_utf8(text, what=f"--stop {text!r}", kind="texts")
    return text


def check_utf8(text: str, *, what: str, kind: str) -> None:
    """Refuse a text of the command line that no tokenizer can take.

    Raises:
        ConfigError: It has bytes that are no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is not UTF-8 at character {error.start}; {kind} must be valid UTF-8; re-encode"
            " it"
        ) from error
