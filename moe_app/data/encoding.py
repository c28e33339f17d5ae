"""Tokenizes chunks of lines, in this process or in several, with results in the chunks' order."""

import argparse
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.data import jsonl
from megatron.trainer.data.encoding import Ids
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.data.writer import token_dtype
from megatron.trainer.errors import DataError
from moe_app.data.text_chunks import Chunk
from moe_app.data.worker_process import begin_worker

_CHUNKS_AHEAD = 4
_MOST_BYTES_AHEAD = 1 << 28
_MOST_LISTED = 20
_BLOCK_BYTES = 1 << 20


@dataclass(kw_only=True)
class Encoded:
    """Holds the tokens of a chunk."""

    ids: npt.NDArray[np.integer] = field(default_factory=lambda: np.empty(0, np.uint16))
    """All documents' tokens, end to end."""
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of each document that has any."""
    num_lines: int = 0
    num_blank_lines: int = 0
    num_empty_documents: int = 0
    """Documents without a token."""
    num_text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    num_bad_lines: int = 0
    """Lines that hold no document."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Of the first of them: its number in the chunk, from 1, and what is wrong."""

    def add_problem(self, number: int, problem: str) -> None:
        """Count a bad line."""
        self.num_bad_lines += 1
        if len(self.problems) < _MOST_LISTED:
            self.problems.append((number, problem))


class Encoder:
    """Tokenizes lines; each worker process has one."""

    def __init__(self, tokenizer: Tokenizer, *, key: str, append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.key = key
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eod] if append_eod else [], self._dtype)

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokenize every line of a chunk.

        Raises:
            DataError: The input is no JSON Lines file.
        """
        found = Encoded()
        with chunk.open() as file:
            texts = list(self._texts(chunk, file, found))
        parts = []
        for ids in self._documents(texts, found):
            parts += [ids, self._end]
        if parts:
            found.ids = np.concatenate(parts, dtype=self._dtype, casting="unsafe")
            sizes = np.fromiter((part.size for part in parts), np.int32, len(parts))
            found.lengths = sizes.reshape(-1, 2).sum(1, dtype=np.int32)
        return found

    def _texts(self, chunk: Chunk, file: BinaryIO, found: Encoded) -> Iterator[tuple[int, str]]:
        """Yield the texts of lines, with the lines' numbers in the chunk."""
        for number, line in enumerate(_cut_lines(file, chunk), start=1):
            found.num_lines += 1
            if line is None:
                found.add_problem(number, jsonl.too_long())
                continue
            if chunk.start == 0 and number == 1:
                line = jsonl.without_mark(line, path=chunk.name)
            if chunk.start == 0 and number == found.num_blank_lines + 1:
                jsonl.refuse_array(line, path=chunk.name, number=number)
            if not line.strip():
                found.num_blank_lines += 1
                continue
            try:
                text = jsonl.parse_text(line, key=self.key, path=chunk.name, number=number)
            except DataError as error:
                where = f"{chunk.name}, line {number}"
                found.add_problem(number, str(error).removeprefix(where))
            else:
                yield number, text

    def _documents(self, texts: Sequence[tuple[int, str]], found: Encoded) -> Iterator[Ids]:
        """Yield the ids of each document that has any, without the token that ends it."""
        for number, text, ids in self._encoded(texts):
            if isinstance(ids, str):
                found.add_problem(number, f": {ids}")
                continue
            found.num_text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
            if not ids.size:
                found.num_empty_documents += 1
                continue
            yield ids

    def _encoded(self, texts: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str, Ids | str]]:
        """Yield each text with its ids, or with what the tokenizer says against it."""
        try:
            all_ids = self.tokenizer.encode_documents([text for _, text in texts])
        except DataError:  # of one text; which one, only they alone can tell
            for number, text in texts:
                try:
                    yield number, text, self.tokenizer.encode_documents([text])[0]
                except DataError as error:
                    yield number, text, str(error)
            return
        for (number, text), ids in zip(texts, all_ids, strict=True):
            yield number, text, ids


def _cut_lines(file: BinaryIO, chunk: Chunk) -> Iterator[bytes | None]:
    """Yield the lines of a chunk; None for one that is too long."""
    rest = chunk.stop - chunk.start
    most = jsonl.MOST_LINE_BYTES
    while rest > 0:
        line = file.readline(min(rest, most + 1))
        if not line:
            raise DataError(
                f"{chunk.name} is shorter than when it was opened; an input must not change while"
                " it is read; start again when it is complete"
            )
        rest -= len(line)
        is_too_long = len(line) > most
        while is_too_long and rest > 0 and line and not line.endswith(b"\n"):
            line = file.readline(min(rest, _BLOCK_BYTES))
            rest -= len(line)
        yield None if is_too_long else line


class _Worker:
    """Holds the encoder of this worker process, set once when the process starts."""

    encoder: Encoder

    @classmethod
    def start(cls, args: argparse.Namespace, key: str) -> None:
        """Load the tokenizer, and end with the process that started this one."""
        begin_worker()
        cls.encoder = Encoder(open_tokenizer(args), key=key, append_eod=args.append_eod)

    @classmethod
    def encode(cls, chunk: Chunk) -> Encoded:
        """Encode with this process's encoder."""
        return cls.encoder.encode(chunk)


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer that the flags name."""
    return load_tokenizer(args.tokenizer_type, args.tokenizer_model, eod_token=args.eod_token)


@contextmanager
def encoded_chunks(
    args: argparse.Namespace, key: str, tokenizer: Tokenizer, chunks: Iterable[Chunk]
) -> Iterator[Iterator[tuple[Chunk, Encoded]]]:
    """Give chunks with their tokens, in order; processes that encode end with the context."""
    if args.workers == 1:
        encoder = Encoder(tokenizer, key=key, append_eod=args.append_eod)
        yield ((chunk, encoder.encode(chunk)) for chunk in chunks)
        return
    with ProcessPoolExecutor(
        args.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start,
        initargs=(args, key),
    ) as pool:
        try:
            yield _encode_in(pool, chunks, workers=args.workers)
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_in(
    pool: Executor, chunks: Iterable[Chunk], *, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Encode chunks in worker processes; only a few a worker are in memory at a time."""
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    ahead = 0
    for chunk in chunks:
        pending.append((chunk, pool.submit(_Worker.encode, chunk)))
        ahead += chunk.stop - chunk.start
        # Beyond a cut there may be a terabyte to pass over, in vain if the line is an error.
        while pending and (
            chunk.is_cut or len(pending) >= workers * _CHUNKS_AHEAD or ahead > _MOST_BYTES_AHEAD
        ):
            first, future = pending.popleft()
            ahead -= first.stop - first.start
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()
