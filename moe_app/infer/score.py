"""Compute log-probabilities of texts under a trained model, alone or under torchrun.

    python tools/score.py --load runs/quickstart --input texts.jsonl --output scored.jsonl

Each line of the input is an object with a text or a list of tokens; the output has the same lines
with `token_logprobs`, `sum_logprob` and `num_tokens` added. docs/inference.md defines them.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from megatron.trainer.data.jsonl import TextLines
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.inference.lines import Line, OutputFile, read_tokens
from megatron.trainer.inference.scoring import compute_logits, score
from megatron.trainer.runtime.collective import gather_on_rank0, on_all_ranks, on_rank0
from megatron.trainer.runtime.launch import environment_rank, run_main
from megatron.trainer.runtime.log import configure_logging
from moe_app.command_line import program
from moe_app.infer import open_model

logger = logging.getLogger("score")

T = TypeVar("T")

OUTPUT_KEYS = ("token_logprobs", "sum_logprob", "num_tokens")
"""The keys that are added to each object."""
LOGITS_LIMIT_BYTES = 1 << 30
"""The largest array of `--logits`, which is assembled in memory."""
TOKENS_PER_ROUND = 1 << 19
"""Approximate number of tokens read, sorted by length, scored and written at a time."""


@dataclass(frozen=True, kw_only=True)
class InputStats:
    """Summarizes an input whose lines are all valid."""

    num_lines: int
    """Number of lines."""
    longest: int
    """Tokens of the longest line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Score as `argv` says; return the exit status."""
    return run_main(lambda: run(open_model.parse(make_parser(), argv)))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("score"),
        description="Log-probabilities of texts under a trained model, alone or under torchrun.",
    )
    open_model.add_model_flags(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help='JSON Lines, each {"text": TEXT} or {"tokens": [ID, ...]}; gzip and zstd, too; - is'
        " standard input",
    )
    data.add_argument(
        "--output", required=True, metavar="FILE", help="the same lines with the scores added"
    )
    data.add_argument(
        "--logits",
        metavar="FILE.npy",
        help="write all logits too, fp32 [lines, longest line - 1, vocabulary], NaN after a line's"
        f" end; at most {LOGITS_LIMIT_BYTES >> 20} MiB",
    )
    open_model.add_tokens_per_batch(data)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and score every line.

    Raises:
        UserError: a flag, the input, the checkpoint or the tokenizer is invalid.
    """
    configure_logging(environment_rank())
    with open_model.joined_ranks(args), contextlib.ExitStack() as stack:
        opened = open_model.open_checkpoint(args, prog=program("score"))
        reader = InputReader(args, opened)
        stats = on_rank0("reading the input", reader.measure)
        vocab_size = opened.saved.model.vocab_size
        on_rank0("checking --logits", lambda: check_logits(args, stats, vocab_size))
        output = on_all_ranks("opening the output", lambda: open_output(args.output))
        logits_output = on_all_ranks("opening the output", lambda: open_output(args.logits))
        for file in (output, logits_output):
            if file is not None:
                stack.enter_context(file)
        loaded = open_model.load_model(args, opened)
        writer = ScoreWriter(output, logits_output, stats, vocab_size)
        for lines in read_rounds(reader):
            rows = {number: line.ids for number, line in enumerate(lines)}
            scores = gather_on_rank_0(score(loaded.parallel, rows, **_sharding(args, loaded)))
            on_all_ranks("writing the scores", functools.partial(writer.write, lines, scores))
            if args.logits is not None:
                logits = gather_on_rank_0(
                    compute_logits(loaded.parallel, rows, **_sharding(args, loaded))
                )
                writer.add_logits(logits)
            writer.advance(lines)
        on_all_ranks("writing the scores", writer.finish)


def _sharding(args: argparse.Namespace, loaded: open_model.LoadedModel) -> dict[str, int]:
    """Return how the rows of a round are split into batches and over ranks."""
    return {
        "tokens_per_batch": args.tokens_per_batch,
        "data_parallel_rank": loaded.ctx.data_parallel_rank,
        "data_parallel_size": loaded.ctx.layout.data,
    }


class InputReader:
    """Reads the input, a pipe too, as often as requested; opens the tokenizer when a text needs it.

    Args:
        args: the command line.
        opened: the checkpoint.
    """

    def __init__(self, args: argparse.Namespace, opened: open_model.OpenedCheckpoint) -> None:
        self._lines = TextLines(args.input, is_reread=True)
        self._seq_length = opened.saved.training.seq_length
        self._vocab_size = opened.saved.model.vocab_size
        self._tokenizer = functools.cache(lambda: open_model.open_tokenizer(args, opened))

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines.

        Raises:
            ConfigError: a text needs a tokenizer, and none is available.
            DataError: a line is invalid.
        """
        yield from read_tokens(
            self._lines,
            text_key="text",
            encode=lambda text: self._tokenizer().encode_document(text),
            vocab_size=self._vocab_size,
            max_tokens=self._seq_length + 1,
            rule=f"one more than {self._seq_length}, the --seq-length of training",
            written_keys=OUTPUT_KEYS,
        )

    def measure(self) -> InputStats:
        """Read and check every line once.

        Raises:
            UserError: a line is invalid, or there are none.
        """
        lengths = [len(line.ids) for line in self]
        self._lines.log_blank(logger)
        if not lengths:
            raise ConfigError(
                f"{self._lines.name} has no lines; there is nothing to score; name another --input"
            )
        return InputStats(num_lines=len(lengths), longest=max(lengths))


class ScoreWriter:
    """Writes results to the output files; does nothing on ranks above 0, which have none.

    Args:
        output: file for the lines.
        logits_output: file for the logits, if requested.
        stats: the input's size.
        vocab_size: v.
    """

    def __init__(
        self,
        output: OutputFile | None,
        logits_output: OutputFile | None,
        stats: InputStats,
        vocab_size: int,
    ) -> None:
        self._output = output
        self._logits_output = logits_output
        self._stats = stats
        self._num_lines = 0
        self._num_scored = 0
        self._sum = 0.0
        self._started = time.perf_counter()
        shape = (stats.num_lines, stats.longest - 1, vocab_size)
        self._logits = None if logits_output is None else np.full(shape, np.nan, dtype=np.float32)

    def write(self, lines: Sequence[Line], scores: Mapping[int, list[float]]) -> None:
        """Append lines and their scores.

        Raises:
            CheckpointError: a score is not finite.
            DataError: the file cannot be written.
        """
        if self._output is None:
            return
        for number, line in enumerate(lines):
            values = scores.get(number, [])
            if not all(math.isfinite(value) for value in values):
                raise CheckpointError(
                    f"{line.where}: a log-probability is not finite; a valid model gives finite"
                    " ones, so its weights are corrupt; take an earlier checkpoint with --ckpt-step"
                )
            total = math.fsum(values)
            added = {
                "token_logprobs": values,
                "sum_logprob": total,
                "num_tokens": len(line.ids),
            }
            self._output.write_record({**line.record, **added})
            self._sum += total
            self._num_scored += len(values)

    def add_logits(self, logits: Mapping[int, torch.Tensor]) -> None:
        """Store the logits [tokens - 1, v] of the lines that `advance` counts next."""
        if self._logits is not None:
            for number, values in logits.items():
                self._logits[self._num_lines + number, : len(values)] = values.numpy()

    def advance(self, lines: Sequence[Line]) -> None:
        """Count lines as done and log progress."""
        self._num_lines += len(lines)
        logger.info("scored %d of %d lines", self._num_lines, self._stats.num_lines)

    def finish(self) -> None:
        """Move the files to their final paths.

        Raises:
            DataError: they cannot be written.
        """
        if self._logits_output is not None and self._logits is not None:
            self._logits_output.write_array(self._logits)
            self._logits_output.finish()
        if self._output is not None:
            self._output.finish()
            seconds = time.perf_counter() - self._started
            logger.info(
                "%d tokens, mean log-probability %.4f; %.0f tokens per second",
                self._num_scored,
                self._sum / max(1, self._num_scored),
                self._num_scored / seconds,
            )


def read_rounds(reader: InputReader) -> Iterator[list[Line]]:
    """Yield the lines that rank 0 reads, in groups of about TOKENS_PER_ROUND tokens; collective."""
    lines = iter(reader)
    while group := on_rank0("reading the input", functools.partial(_next_group, lines)):
        yield group


def _next_group(lines: Iterator[Line]) -> list[Line]:
    """Return the next group of lines; empty at the end."""
    group: list[Line] = []
    tokens = 0
    for line in lines:
        group.append(line)
        tokens += len(line.ids)
        if tokens >= TOKENS_PER_ROUND:
            break
    return group


def gather_on_rank_0(found: dict[int, T]) -> dict[int, T]:
    """Gather the results of all ranks on rank 0; empty elsewhere. A collective call."""
    return {number: value for each in gather_on_rank0(found) for number, value in each.items()}


def check_logits(args: argparse.Namespace, stats: InputStats, vocab_size: int) -> None:
    """Refuse logits that are too large, or share a file with the lines.

    Raises:
        ConfigError: either is the case.
    """
    if args.logits is not None and os.path.realpath(args.logits) == os.path.realpath(args.output):
        raise ConfigError(
            f"--output and --logits are both {args.logits}; each needs a file of its own; name"
            " another one"
        )
    size = stats.num_lines * (stats.longest - 1) * vocab_size * 4
    if args.logits is not None and size > LOGITS_LIMIT_BYTES:
        raise ConfigError(
            f"--logits would be {size:,} bytes ({stats.num_lines} lines x {stats.longest - 1} x"
            f" {vocab_size} x 4); it must be at most {LOGITS_LIMIT_BYTES:,}; give fewer or shorter"
            " lines"
        )


def open_output(path: str | None) -> OutputFile | None:
    """Open an output file on rank 0, if one is requested."""
    return None if path is None or environment_rank() != 0 else OutputFile(path)
