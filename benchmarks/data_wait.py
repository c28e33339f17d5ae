"""Measures how long a step waits for its data, read in the step and read ahead.

    python -m benchmarks.data_wait --work /scratch --json data_wait.json

Writes three token files of random ids to a new directory in --work, and reads them with the classes
of a run as rank 0 of each data parallel size in --data-parallel. Each step sleeps for the time that
a device would compute. The wait of the first step, which cannot be read ahead, is reported
separately.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.timing import Summary, summarize
from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.build import build_data
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.writer import TokenFileWriter

_VOCAB_SIZE = 50_304
_WEIGHTS = (0.7, 0.2, 0.1)
_DOCUMENT_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Holds the seconds that steps of one kind of reader waited."""

    data_parallel: int
    """Ranks that share the global batch; this process reads the part of rank 0."""
    num_workers: int
    """Global batches read ahead; 0 means none."""
    first_s: float
    """Wait of the first step."""
    later_s: list[float]
    """Wait of each later step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        data_path = _write_files(Path(folder), tokens=args.tokens)
        found = measure(args, data_path)
    print(_table(found))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(each) for each in found], indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.data_wait", description=__doc__)
    parser.add_argument("--work", default=None, help="where the files go (the system's own place)")
    parser.add_argument(
        "--tokens", type=int, default=100_000_000, help="of each file (%(default)s)"
    )
    parser.add_argument("--global-batch-size", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seq-length", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[1, 64], metavar="N")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--steps", type=int, default=20, help="after the first (%(default)s)")
    parser.add_argument("--step-s", type=float, default=0.5, help="pause (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser


def measure(args: argparse.Namespace, data_path: tuple[str, ...]) -> list[Waits]:
    """Measure the waits of the steps of each reader."""
    found = []
    for ranks in args.data_parallel:
        for num_workers in args.num_workers:
            stream = _open(args, data_path, num_workers=num_workers)
            waits = []
            for _ in range(args.steps + 1):
                waits.append(_wait(args, stream, ranks=ranks))
                time.sleep(args.step_s)
            stream.stop_reading()
            found.append(
                Waits(
                    data_parallel=ranks,
                    num_workers=num_workers,
                    first_s=waits[0],
                    later_s=waits[1:],
                )
            )
    return found


def _open(
    args: argparse.Namespace, data_path: tuple[str, ...], *, num_workers: int
) -> SampleStream:
    cfg = DataConfig(data_path=data_path, num_workers=num_workers)
    return build_data(cfg, vocab_size=_VOCAB_SIZE, seq_length=args.seq_length, seed=1).train


def _wait(args: argparse.Namespace, stream: SampleStream, *, ranks: int) -> float:
    started = time.perf_counter()
    stream.next_global_batch(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=ranks,
    )
    return time.perf_counter() - started


def _write_files(folder: Path, *, tokens: int) -> tuple[str, ...]:
    """Write a file for each weight; return the data_path."""
    rng = np.random.default_rng(0)
    data_path: list[str] = []
    for number, weight in enumerate(_WEIGHTS):
        prefix = str(folder / f"source{number}")
        with TokenFileWriter(prefix, vocab_size=_VOCAB_SIZE) as writer:
            for start in range(0, tokens, _DOCUMENT_TOKENS):
                size = min(_DOCUMENT_TOKENS, tokens - start)
                writer.add_document(rng.integers(0, _VOCAB_SIZE, size, dtype=np.uint16))
            writer.finish()
        data_path += [str(weight), prefix]
    return tuple(data_path)


def _table(found: Sequence[Waits]) -> str:
    lines = [
        "| DP | --num-workers | first step, ms | a step waits, ms |",
        "|---|---|---|---|",
    ]
    for each in found:
        wait = _in_ms(summarize(each.later_s))
        lines.append(
            f"| {each.data_parallel} | {each.num_workers} | {each.first_s * 1e3:.1f} | {wait} |"
        )
    return "\n".join(lines)


def _in_ms(seconds: Summary) -> str:
    return f"{seconds.median * 1e3:.2f} ({seconds.low * 1e3:.2f} to {seconds.high * 1e3:.2f})"


if __name__ == "__main__":
    sys.exit(main())
