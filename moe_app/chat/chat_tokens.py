"""Tokenises rows, one after the other, into a directory of tokens."""

import hashlib
import itertools
import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron.trainer.errors import DataError
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_files import BadRows, read_each
from moe_app.chat.chat_rows import Unit
from moe_app.chat.dialogue import ChatKind, Dialogue, Turn
from moe_app.chat.jinja_template import RenderingError
from moe_app.chat.parallel_encoding import Encode
from moe_app.chat.samples import DialogueEncoder, OverlongError, Sample
from moe_app.chat.token_store import StoreWriter
from moe_app.data.sources import SourceFile

logger = logging.getLogger(__name__)

_PROGRESS_ROWS = 100_000
_MOST_PARTNERS = 64
_MOST_FITTING = 8
"""Rows that are tried for a mismatched pair: for another prompt, and for its length."""


@dataclass(kw_only=True)
class RowCounts:
    """Counts rows."""

    rows: int = 0
    """That were kept."""
    overlong: int = 0
    """That were dropped because a text is too long."""
    truncated: int = 0
    """That were kept with a text that was cut."""
    bad: int = 0
    """That hold no conversation."""
    counted_tokens: int = 0
    """Tokens that count in the loss."""


def encoded_units(
    files: Sequence[SourceFile],
    kind: ChatKind,
    cfg: ChatDataConfig,
    encode: Encode,
    *,
    counts: RowCounts,
    bad: BadRows,
) -> Iterator[tuple[str, Unit, list[Sample]]]:
    """Yield where each kept row is, what it holds, and its texts' tokens.

    Raises:
        DataError: A file cannot be read, there are too many bad rows, or a text is too long and
            must not be.
    """
    # Rows are read ahead of those that are encoded; what is wrong with them is told in their order.
    rows = (
        ((where, unit), () if isinstance(unit, str) else unit.dialogues)
        for where, unit in read_each(files, kind, cfg)
    )
    for (where, unit), samples in encode(rows):
        if isinstance(unit, str):
            bad.add(unit)
        elif isinstance(samples, RenderingError):
            raise DataError(f"{where}: {samples}") from samples
        elif isinstance(samples, OverlongError):
            if cfg.overlong == "error":
                raise DataError(f"{where}: {samples}") from samples
            counts.overlong += 1
        elif isinstance(samples, DataError):
            bad.add(f"{where}: {samples}")
        else:
            counts.rows += 1
            counts.truncated += any(each.is_cut for each in samples)
            counts.counted_tokens += sum(each.num_counted for each in samples)
            yield where, unit, samples
            if counts.rows % _PROGRESS_ROWS == 0:
                logger.info("tokenised %s rows", f"{counts.rows:,}")
    counts.bad = bad.count


def write_tokens(
    path: Path,
    files: Sequence[SourceFile],
    kind: ChatKind,
    cfg: ChatDataConfig,
    encoder: DialogueEncoder,
    encode: Encode,
    *,
    key: str,
) -> None:
    """Tokenise files into an empty directory.

    Texts are in the order of the rows, the better answer of a pair first; the mismatched texts of
    judged rows follow all others.

    Raises:
        DataError: As `encoded_units`, or no row is left.
    """
    counts, bad = RowCounts(), BadRows(cfg.max_bad_rows)
    with StoreWriter(path) as writer:
        units = encoded_units(files, kind, cfg, encode, counts=counts, bad=bad)
        if kind == "kto":
            _write_judged(writer, units, encoder, encode, path / "rows.tmp")
        else:
            for _, _, samples in units:
                for sample in samples:
                    writer.add(sample.ids, sample.counted)
        if not counts.rows:
            raise DataError(
                f"{', '.join(each.path for each in files)}: no row is left to train on:"
                f" {counts.bad} hold no conversation, {counts.overlong} have more than"
                f" --seq-length {encoder.seq_length} tokens; give other data, or raise --seq-length"
            )
        facts: dict[str, Any] = {"key": key, "kind": kind, **asdict(counts), "shown": bad.shown}
        writer.finish(facts)


def _write_judged(
    writer: StoreWriter,
    units: Iterator[tuple[str, Unit, list[Sample]]],
    encoder: DialogueEncoder,
    encode: Encode,
    spool: Path,
) -> None:
    """Write judged texts, then for each its prompt with another row's answer.

    Rows are kept on disk meanwhile.
    """
    places, prompts = array("q", [0]), array("q")
    with spool.open("x+b") as file:
        for _, unit, samples in units:
            dialogue = unit.dialogues[0]
            writer.add(samples[0].ids, samples[0].counted)
            writer.add_label(bool(unit.label))
            content = json.dumps(
                [[turn.role, turn.content] for turn in dialogue.turns] + [dialogue.first_counted]
            ).encode()
            places.append(places[-1] + file.write(content))
            prompts.append(_digest(dialogue))
        rows = _SpooledRows(file, places)
        for number, found in encode(_with_partners(rows, prompts), is_whole=True):
            if isinstance(found, DataError):
                raise found
            sample = _mismatched(number, rows, prompts, encoder, found)
            writer.add(sample.ids, sample.counted)
    spool.unlink()


class _SpooledRows:
    """Reads conversations back from a file."""

    def __init__(self, file: BinaryIO, places: Sequence[int]) -> None:
        self._file = file
        self._places = places

    def __getitem__(self, number: int) -> Dialogue:
        begin, end = self._places[number], self._places[number + 1]
        self._file.seek(begin)
        *turns, first = json.loads(self._file.read(end - begin))
        return Dialogue(turns=tuple(Turn(*turn) for turn in turns), first_counted=first)


def _partners(number: int, prompts: Sequence[int]) -> Iterator[int]:
    """Yield the rows whose answers a row may get, the first half of the data away."""
    count = len(prompts)
    for step in range(min(count - 1, _MOST_PARTNERS)):
        other = (number + max(1, count // 2) + step) % count
        if other != number and prompts[other] != prompts[number]:
            yield other


def _with_partners(
    rows: _SpooledRows, prompts: Sequence[int]
) -> Iterator[tuple[int, list[Dialogue]]]:
    """Yield each row's number, and its prompt with the answer that it gets if that fits."""
    for number in range(len(prompts)):
        first = next(_partners(number, prompts), None)
        yield number, [] if first is None else [_joined(rows[number], rows[first])]


def _mismatched(
    number: int,
    rows: _SpooledRows,
    prompts: Sequence[int],
    encoder: DialogueEncoder,
    first: Sequence[Sample],
) -> Sample:
    """Return the tokens of a row's prompt with the answer of a row far away.

    That row is half of the data away, or the next one after it whose prompt is another and whose
    answer fits; without one that fits, the text is cut.

    Args:
        number: of the row.
        rows: all of them.
        prompts: what tells their prompts apart.
        encoder: for partners after the first.
        first: the tokens with the first partner's answer; empty where there is none.

    Raises:
        DataError: There is no other row.
    """
    count = len(prompts)
    if count < 2:
        raise DataError(
            "KTO compares each prompt with the answer of another row, but there is only one row;"
            " give at least two"
        )
    if first and len(first[0].ids) <= encoder.seq_length:
        return first[0]
    own = rows[number]
    sample = first[0].cut(encoder.seq_length) if first else None
    for other in itertools.islice(_partners(number, prompts), 1, _MOST_FITTING):
        found = encoder.encode_whole(_joined(own, rows[other]))
        if len(found.ids) <= encoder.seq_length:
            return found
        if sample is None or not sample.num_counted:
            sample = found.cut(encoder.seq_length)
    if sample is None:  # all prompts are the same
        sample = encoder.encode_whole(_joined(own, rows[(number + 1) % count]))
    return sample.cut(encoder.seq_length)


def _joined(own: Dialogue, other: Dialogue) -> Dialogue:
    """Return a conversation's prompt with another's answer."""
    prompt = own.turns[: own.first_counted]
    answer = other.turns[other.first_counted :]
    return Dialogue(turns=prompt + answer, first_counted=own.first_counted)


def _digest(dialogue: Dialogue) -> int:
    """Return a number that tells prompts apart."""
    prompt = [[turn.role, turn.content] for turn in dialogue.turns[: dialogue.first_counted]]
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
