"""Cuts named texts into windows of tokens, as pretraining does: documents one after the other."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.indexed import check_ids, open_tokens
from megatron.trainer.data.jsonl import TextLines, parse_text
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError

Tokens = npt.NDArray[np.int32]

ALL = "all"
"""In tables stands for all domains together, or for all layers."""
NO_TOKEN = -1
"""What follows the last token of a domain."""
_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Names a text."""

    name: str
    path: str
    """A JSON Lines file, or the prefix of a token file."""
    is_tokens: bool


@dataclass(frozen=True, kw_only=True)
class Window:
    """Holds consecutive tokens that one forward pass reads."""

    domain: int
    """Which of the domains it is of."""
    tokens: Tokens
    """[n] what the model reads."""
    following: int
    """The token after them; NO_TOKEN at the end of a domain."""


def parse_domains(texts: Sequence[str], prefixes: Sequence[str]) -> list[Domain]:
    """Read NAME=FILE and NAME=PREFIX arguments.

    Raises:
        ConfigError: one has another form, a name comes twice, or there are none.
    """
    domains = []
    for values, flag in ((texts, "--data"), (prefixes, "--data-path")):
        for value in values:
            name, separator, path = value.partition("=")
            if not separator or not name or not path or PurePath(name).name != name:
                raise ConfigError(
                    f"{flag} {value!r} is not NAME=PATH; each text has a name for the tables; give"
                    f" for example {flag} code={path or value}"
                )
            domains.append(Domain(name=name, path=path, is_tokens=flag == "--data-path"))
    names = [domain.name for domain in domains]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the name {twice!r} is given twice; each text has its own name")
    if ALL in names:
        raise ConfigError(f"the name {ALL!r} stands for all texts together; give another name")
    if not domains:
        raise ConfigError(
            "no text is given; name at least one with --data NAME=FILE.jsonl or --data-path"
            " NAME=PREFIX"
        )
    return domains


def token_blocks(
    domain: Domain, *, key: str, vocab_size: int, tokenizer: Callable[[], Tokenizer]
) -> Iterator[Tokens]:
    """Yield a domain's tokens in blocks of any size.

    Raises:
        UserError: the text cannot be read, or has ids that the model does not know.
    """
    if domain.is_tokens:
        file = open_tokens(domain.path, vocab_size=vocab_size)
        for start in range(0, file.num_tokens, _BLOCK):
            block = np.asarray(file.tokens[start : start + _BLOCK])
            check_ids(block, vocab_size, file=f"{domain.path}.bin", first_token=start)
            yield block.astype(np.int32)
        return
    encoder = tokenizer()
    lines = TextLines(domain.path)
    for number, line in lines:
        text = parse_text(line, key=key, path=lines.name, number=number)
        ids = encoder.encode_document(text)
        if ids:
            yield np.array([*ids, encoder.eod], dtype=np.int32)


def cut_windows(
    blocks: Iterable[Tokens], *, domain: int, length: int, limit: int | None
) -> Iterator[Window]:
    """Cut a domain's tokens into windows; the last may be shorter.

    Args:
        blocks: the tokens.
        domain: which domain they are.
        length: tokens of a window.
        limit: stop after the window that reaches so many tokens; None takes all.
    """
    rest = np.zeros(0, dtype=np.int32)
    taken = 0
    for block in blocks:
        rest = np.concatenate([rest, block])
        start = 0
        while len(rest) - start > length:  # one more, which follows
            window = rest[start : start + length]
            yield Window(domain=domain, tokens=window, following=int(rest[start + length]))
            start += length
            taken += length
            if limit is not None and taken >= limit:
                return
        rest = rest[start:]
    if len(rest):
        yield Window(domain=domain, tokens=rest, following=NO_TOKEN)


def group_windows(windows: Iterable[Window], *, num_tokens: int) -> Iterator[list[Window]]:
    """Group windows for the shards: each but the last has at least `num_tokens` tokens."""
    group: list[Window] = []
    count = 0
    for window in windows:
        group.append(window)
        count += len(window.tokens)
        if count >= num_tokens:
            yield group
            group, count = [], 0
    if group:
        yield group


def following_tokens(window: Window) -> Tokens:
    """Return [n] the token after each of a window's."""
    return np.append(window.tokens[1:], np.int32(window.following)).astype(np.int32)


def digest(windows: Iterable[Window]) -> str:
    """Compute the SHA-256 of windows: their cuts, domains and tokens."""
    found = hashlib.sha256()
    for window in windows:
        head = np.array([window.domain, len(window.tokens), window.following], dtype="<i8")
        found.update(head.tobytes() + window.tokens.astype("<i4").tobytes())
    return found.hexdigest()
