"""Tokenize JSON Lines into token files: PREFIX_KEY_document.bin and .idx.

    python tools/preprocess_data.py --input code.jsonl docs.jsonl --output-prefix data/corpus \
        --tokenizer-model data/tokenizer.model --append-eod --workers 2

An input may be a file, a pipe or `-` for standard input, plain or compressed with gzip or zstd.
The output depends on the input and the tokenizer alone, not on the number of workers. Beside it,
PREFIX_KEY_document.json says which tokenizer wrote it; pretraining compares it with its own.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.jsonl import TextLines, parse_text
from megatron.trainer.data.text_input import check_inputs
from megatron.trainer.data.token_manifest import (
    TokenManifest,
    identify_tokenizer,
    write_manifest,
)
from megatron.trainer.data.tokenizer import (
    TOKENIZER_CHOICES,
    Tokenizer,
    describe_ends,
    load_tokenizer,
)
from megatron.trainer.data.writer import TokenFileWriter, token_dtype
from megatron.trainer.errors import DataError, UserError
from moe_app.command_line import argument_text, program

_CHUNK_BYTES = 1 << 20
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Chunk:
    """Holds lines of one input, the unit of work."""

    path: str
    lines: list[tuple[int, bytes]]
    """Each with its number in the input."""


@dataclass(frozen=True)
class Encoded:
    """Holds the tokens of a chunk."""

    ids: npt.NDArray[np.integer]
    """All documents' tokens, concatenated."""
    lengths: list[int]
    """Tokens per document; 0 for an empty one, which is not written."""
    text_bytes: int
    """UTF-8 bytes of text read."""


class Encoder:
    """Tokenizes lines; each worker process has one."""

    def __init__(self, tokenizer: Tokenizer, *, key: str, append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.key = key
        self.append_eod = append_eod

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokenize every line of a chunk.

        Raises:
            DataError: A line holds no text under the key.
        """
        documents: list[list[int]] = []
        text_bytes = 0
        for number, line in chunk.lines:
            text = parse_text(line, key=self.key, path=chunk.path, number=number)
            text_bytes += len(text.encode("utf-8"))
            ids = self.tokenizer.encode_document(text)
            if ids and self.append_eod:
                ids.append(self.tokenizer.eod)
            documents.append(ids)
        dtype = token_dtype(self.tokenizer.vocab_size)
        flat = np.fromiter(chain.from_iterable(documents), dtype=dtype)
        return Encoded(flat, [len(ids) for ids in documents], text_bytes)


class _Worker:
    """Holds the encoder of this worker process, set once when the process starts."""

    encoder: Encoder

    @classmethod
    def start(cls, args: argparse.Namespace, key: str) -> None:
        """Load the tokenizer."""
        cls.encoder = Encoder(open_tokenizer(args), key=key, append_eod=args.append_eod)

    @classmethod
    def encode(cls, chunk: Chunk) -> Encoded:
        """Encode with this process's encoder."""
        return cls.encoder.encode(chunk)


def read_chunks(inputs: Iterable[TextLines]) -> Iterator[Chunk]:
    """Cut inputs into chunks of about a megabyte at line ends, in order."""
    for source in inputs:
        lines: list[tuple[int, bytes]] = []
        size = 0
        for number, line in source:
            lines.append((number, line))
            size += len(line)
            if size >= _CHUNK_BYTES:
                yield Chunk(source.name, lines)
                lines, size = [], 0
        if lines:
            yield Chunk(source.name, lines)


def encode_chunks(chunks: Iterable[Chunk], pool: Executor, *, workers: int) -> Iterator[Encoded]:
    """Encode chunks in worker processes and yield the results in the chunks' order.

    Only a few chunks a worker are in memory at a time.

    Raises:
        DataError: A line holds no text under the key.
    """
    pending: deque[Future[Encoded]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_Worker.encode, chunk))
        if len(pending) >= workers * _CHUNKS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer that the flags name."""
    return load_tokenizer(args.tokenizer_type, args.tokenizer_model, eod_token=args.eod_token)


def preprocess(args: argparse.Namespace, key: str, inputs: Sequence[TextLines]) -> None:
    """Write the token file of one key and print a summary.

    Args:
        args: The command line.
        key: Where in an object the text is.
        inputs: What `--input` names.

    Raises:
        DataError: The input or the tokenizer is missing or bad; nothing is left behind then.
    """
    prefix = f"{args.output_prefix}_{key}_document"
    identity = identify_tokenizer(args.tokenizer_type, args.tokenizer_model)
    tokenizer = open_tokenizer(args)
    print(describe_ends(tokenizer))
    started = time.monotonic()
    with (
        TokenFileWriter(prefix, vocab_size=tokenizer.vocab_size) as writer,
        _encoded(args, key, tokenizer, read_chunks(inputs)) as results,
    ):
        skipped, text_bytes = _write(writer, results)
        if writer.num_documents == 0:
            raise DataError(
                f"{' '.join(args.input)}: 0 documents with text under {key!r}, {skipped} without;"
                " there must be at least one; check --input and --json-keys"
            )
        file = writer.finish()
    manifest = TokenManifest(
        tokenizer_type=identity.kind,
        tokenizer_file=identity.path.name,
        tokenizer_sha256=identity.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_token_id=tokenizer.eod if args.append_eod else None,
        num_input_files=len(args.input),
        num_text_bytes=text_bytes,
        num_empty_documents=skipped,
        **dataclasses.asdict(file.facts),
    )
    write_manifest(prefix, manifest)
    seconds = time.monotonic() - started
    print(
        f"{prefix}: {file.num_documents:,} documents ({_passed_over(skipped, inputs)}),"
        f" {file.num_tokens:,} tokens of {file.dtype} from {text_bytes:,} bytes"
        f" ({text_bytes / file.num_tokens:.2f} bytes/token), {seconds:.1f} s,"
        f" {file.num_tokens / seconds:,.0f} tokens/s"
    )


@contextmanager
def _encoded(
    args: argparse.Namespace, key: str, tokenizer: Tokenizer, chunks: Iterable[Chunk]
) -> Iterator[Iterable[Encoded]]:
    """Give the results of encoding chunks, in order; processes that do it end with the context."""
    if args.workers == 1:
        yield map(Encoder(tokenizer, key=key, append_eod=args.append_eod).encode, chunks)
        return
    with ProcessPoolExecutor(
        args.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start,
        initargs=(args, key),
    ) as pool:
        try:
            yield encode_chunks(chunks, pool, workers=args.workers)
        finally:
            pool.shutdown(cancel_futures=True)


def _passed_over(num_empty: int, inputs: Sequence[TextLines]) -> str:
    """Return the part of the summary on what holds no text."""
    num_blank = sum(each.num_blank for each in inputs)
    blank = f" and {num_blank:,} blank lines" if num_blank else ""
    return f"{num_empty:,} empty ones{blank} skipped"


def _write(writer: TokenFileWriter, results: Iterable[Encoded]) -> tuple[int, int]:
    """Write every document that has tokens; return how many had none, and the bytes of text."""
    skipped = text_bytes = 0
    for encoded in results:
        text_bytes += encoded.text_bytes
        stop = 0
        for length in encoded.lengths:
            start, stop = stop, stop + length
            if length:
                writer.add_document(encoded.ids[start:stop])
            else:
                skipped += 1
    return skipped, text_bytes


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("preprocess_data", command="preprocess"),
        description="Turn JSON Lines into token files that the trainer reads with --data-path.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines, read in order; plain, gzip or zstd; - is standard input",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        type=argument_text,
        default=["text"],
        metavar="KEY",
        help="one token file for each",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="the token files are PREFIX_KEY_document.bin and .idx",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_CHOICES,
        default="SentencePieceTokenizer",
        help="what wrote --tokenizer-model",
    )
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="the .model or .json file, or a directory that holds it",
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the token for it"
    )
    parser.add_argument(
        "--eod-token",
        type=argument_text,
        metavar="TEXT",
        help="the token that ends a document; without it, the one that the tokenizer's files name",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes to use")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    args = parse_args(argv)
    try:
        check_inputs(args.input)
        is_reread = len(args.json_keys) > 1
        inputs = [TextLines(path, is_reread=is_reread) for path in args.input]
        for key in args.json_keys:
            preprocess(args, key, inputs)
    except BrokenProcessPool as error:
        print(f"error: a worker process died ({error}); use fewer --workers", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
