"""Decides which token ends a document, from what is said of a tokenizer."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Protocol

from megatron.trainer.data.tokenizer_files import TokenizerSettings
from megatron.trainer.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
"""The piece that separates documents, in our own tokenizers and in OLMoE's."""

_SHOWN = 12
_MARKER = re.compile(r"<\|[^\s<>]+\|>")


class TokenTable(Protocol):
    """Declares what the choice of an end asks of a tokenizer."""

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is written `text`; None for none."""

    def token_text(self, token_id: int) -> str | None:
        """Return how a token is written; None for an id that is none."""

    def can_be_text(self, token_id: int) -> bool:
        """Return whether ordinary text can become this token."""

    def control_texts(self) -> list[str]:
        """Return the tokens that no text becomes."""


@dataclass(frozen=True, kw_only=True)
class DocumentEnd:
    """Names the token that ends a document."""

    token_id: int
    """Its id."""
    text: str
    """How it is written."""
    source: str
    """Who says so, for the log."""
    named_by: str | None = None
    """The file beside the tokenizer that names it."""

    def __str__(self) -> str:
        """Return a line for the log."""
        return f"documents end with {self.text!r} (id {self.token_id}): {self.source}"


def is_marker(text: str) -> bool:
    """Return whether a token is written like `<|endoftext|>`: a mark for the program to place."""
    return _MARKER.fullmatch(text) is not None


def choose_end(
    tokens: TokenTable,
    settings: TokenizerSettings,
    *,
    path: str,
    eod_token: str | None = None,
    own: tuple[int, str] | None = None,
) -> DocumentEnd:
    """Choose the token that ends a document.

    `--eod-token` decides. Without it, the end is what the files beside the tokenizer name as
    `eos_token` (tokenizer_config.json, then special_tokens_map.json) or `eos_token_id`
    (generation_config.json, then the model's config). Where they name several, as chat models do,
    whose turns end with another token than their documents, it is `<|endoftext|>` if that is among
    them, else the first. Where they name none, it is the tokenizer's own, or `<|endoftext|>`.

    Args:
        tokens: the tokenizer's tokens.
        settings: the files beside it.
        path: its file, for messages.
        eod_token: what `--eod-token` says.
        own: the end that the tokenizer's file itself names, and by what.

    Raises:
        DataError: there is none, or it is no token, or one that text can become.
    """
    if eod_token is not None:
        return _asked_for(tokens, eod_token, path=path)
    stated = _stated(tokens, settings, path=path)
    if stated:
        chosen = next((each for each in stated if each.text == END_OF_DOCUMENT), stated[0])
        other = tokens.token_id(END_OF_DOCUMENT)
        if other is None or other == chosen.token_id:
            return chosen
        hint = f"{chosen.source}; it has {END_OF_DOCUMENT!r}, too: --eod-token chooses"
        return dataclasses.replace(chosen, source=hint)
    if own is not None:
        text = tokens.token_text(own[0])
        return DocumentEnd(token_id=own[0], text=text or "", source=own[1])
    token_id = tokens.token_id(END_OF_DOCUMENT)
    if token_id is None or tokens.can_be_text(token_id):
        raise _no_end(tokens, settings, path=path)
    return DocumentEnd(
        token_id=token_id, text=END_OF_DOCUMENT, source=f"{path} has it, and nothing names another"
    )


def _asked_for(tokens: TokenTable, text: str, *, path: str) -> DocumentEnd:
    token_id = tokens.token_id(text)
    if token_id is None:
        raise DataError(
            f"--eod-token {text!r} is no token of {path}; documents must end with one;"
            f" {_choices(tokens)}"
        )
    if tokens.can_be_text(token_id):
        raise DataError(
            f"--eod-token {text!r} (id {token_id}) is what ordinary text becomes in {path}; only a"
            f" token that no text becomes can end documents; {_choices(tokens)}"
        )
    return DocumentEnd(token_id=token_id, text=text, source="--eod-token")


def _stated(tokens: TokenTable, settings: TokenizerSettings, *, path: str) -> list[DocumentEnd]:
    """Return the ends that the files beside a tokenizer name, in their order.

    Ids that are no token, or one that text becomes, are left out: configs of models have defaults
    that belong to another vocabulary.
    """
    ends = []
    named = settings.named_text("eos")
    if named is not None:
        name, text = named
        token_id = tokens.token_id(text)
        if token_id is None or tokens.can_be_text(token_id):
            why = "is no token of" if token_id is None else "is what ordinary text becomes in"
            raise DataError(
                f"{settings.directory / name} names the eos_token {text!r}, which {why} {path};"
                " documents must end with a token that no text becomes; name another with"
                f" --eod-token, or restore the files; {_choices(tokens)}"
            )
        source = f"the eos_token of {settings.directory / name}"
        ends.append(DocumentEnd(token_id=token_id, text=text, source=source, named_by=name))
    for name, token_id in settings.named_ids("eos"):
        found = tokens.token_text(token_id)
        if found is not None and not tokens.can_be_text(token_id):
            source = f"the eos_token_id of {settings.directory / name}"
            ends.append(DocumentEnd(token_id=token_id, text=found, source=source, named_by=name))
    return ends


def _no_end(tokens: TokenTable, settings: TokenizerSettings, *, path: str) -> DataError:
    read = ", ".join(settings.files) or "no tokenizer_config.json or other such file"
    return DataError(
        f"nothing says which token of {path} ends a document: it has no {END_OF_DOCUMENT!r}, and"
        f" the files beside it ({read}) name no eos_token and no eos_token_id that is a token of"
        f" it; name the token with --eod-token; {_choices(tokens)}"
    )


def _choices(tokens: TokenTable) -> str:
    texts = tokens.control_texts()
    more = len(texts) - _SHOWN
    listed = " ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return (
        f"the tokens that no text becomes are: {listed}"
        if texts
        else "it has none that no text becomes"
    )
