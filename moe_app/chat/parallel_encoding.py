"""Encodes conversations in this process or in several, with results in the order of the rows."""

import functools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron.trainer.errors import DataError
from moe_app.chat.dialogue import Dialogue
from moe_app.chat.samples import DialogueEncoder, OverlongError, Sample
from moe_app.data.worker_process import begin_worker

_CHUNK_ROWS, _CHUNK_CHARACTERS = 128, 1 << 20
"""What one message to a process holds at most; a row alone may be longer."""
_CHUNKS_AHEAD = 3
"""Messages a process may have waiting."""

T = TypeVar("T")
EncodedRow = list[Sample] | DataError
"""The tokens of a row's conversations, or what is wrong with them."""


class MakesEncoder(Protocol):
    """Makes an encoder; is handed to other processes."""

    def build(self) -> DialogueEncoder:
        """Return an encoder, whose template is open as long as the process lives."""


class Encode(Protocol):
    """Encodes rows, in their order."""

    def __call__(
        self, rows: Iterable[tuple[T, Sequence[Dialogue]]], *, is_whole: bool = False
    ) -> Iterator[tuple[T, EncodedRow]]:
        """Yield each row with its outcome.

        Args:
            rows: what tells a row from others, and its conversations. It is read ahead.
            is_whole: encode them however many tokens they have.
        """


@contextmanager
def encoding(encoder: DialogueEncoder, recipe: MakesEncoder, workers: int) -> Iterator[Encode]:
    """Give what encodes rows; its processes end with the context.

    Args:
        encoder: of this process.
        recipe: makes those of others.
        workers: processes; 1 is this one alone.

    Raises:
        DataError: A process was killed.
    """
    if workers == 1:
        yield functools.partial(encode_here, encoder)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_RowWorker.start,
        initargs=(recipe,),
    ) as pool:
        try:
            yield functools.partial(_encode_in, pool, workers)
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {workers} processes that tokenise was killed, perhaps for its memory; use"
                " fewer --tokenize-workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def encode_row(
    encoder: DialogueEncoder, dialogues: Sequence[Dialogue], is_whole: bool
) -> EncodedRow:
    """Return the tokens of a row's conversations, or what is wrong with them."""
    try:
        if is_whole:
            return [encoder.encode_whole(each) for each in dialogues]
        samples = [encoder.encode(each) for each in dialogues]
        if len(samples) > 1 and all(
            np.array_equal(samples[0].ids, each.ids) for each in samples[1:]
        ):
            if any(each.is_cut for each in samples):
                raise OverlongError("has two texts whose first tokens are the same")
            raise DataError(
                "has two answers that the template writes alike; a pair must differ; remove it"
            )
    except DataError as error:
        return error
    return samples


def encode_here(
    encoder: DialogueEncoder,
    rows: Iterable[tuple[T, Sequence[Dialogue]]],
    *,
    is_whole: bool = False,
) -> Iterator[tuple[T, EncodedRow]]:
    """Encode in this process; see `Encode`."""
    for name, dialogues in rows:
        yield name, encode_row(encoder, dialogues, is_whole)


def _encode_in(
    pool: Executor,
    workers: int,
    rows: Iterable[tuple[T, Sequence[Dialogue]]],
    *,
    is_whole: bool = False,
) -> Iterator[tuple[T, EncodedRow]]:
    """Encode in other processes; only a few chunks for each are in memory at a time."""
    pending: deque[tuple[list[T], Future[list[EncodedRow]]]] = deque()
    for chunk in _chunks(rows):
        names, dialogues = [name for name, _ in chunk], [each for _, each in chunk]
        pending.append((names, pool.submit(_RowWorker.encode, dialogues, is_whole)))
        if len(pending) >= workers * _CHUNKS_AHEAD:
            yield from _finished(pending)
    while pending:
        yield from _finished(pending)


def _finished(
    pending: deque[tuple[list[T], Future[list[EncodedRow]]]],
) -> Iterator[tuple[T, EncodedRow]]:
    names, future = pending.popleft()
    yield from zip(names, future.result(), strict=True)


def _chunks(
    rows: Iterable[tuple[T, Sequence[Dialogue]]],
) -> Iterator[list[tuple[T, Sequence[Dialogue]]]]:
    chunk: list[tuple[T, Sequence[Dialogue]]] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(turn.content) for each in row[1] for turn in each.turns)
        if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _RowWorker:
    """Holds the encoder of this worker process, made once when the process starts."""

    encoder: DialogueEncoder

    @classmethod
    def start(cls, recipe: Any) -> None:
        """Build the encoder, and end with the process that started this one."""
        begin_worker()
        cls.encoder = recipe.build()

    @classmethod
    def encode(cls, rows: Sequence[Sequence[Dialogue]], is_whole: bool) -> list[EncodedRow]:
        """Encode with this process's encoder."""
        return [encode_row(cls.encoder, dialogues, is_whole) for dialogues in rows]
