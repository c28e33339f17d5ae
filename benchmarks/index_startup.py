"""Measures the start of a run on a token file of many documents: time and memory of each rank.

    python -m benchmarks.index_startup --work /scratch --documents 100000000

Writes the .idx (20 bytes a document) and a .bin of zeros that takes no space to a new directory in
--work, and opens them with what tools/pretrain.py calls, on each number of ranks of one machine,
with a part held back (--split 99,1) and documents kept apart (--reset-attention-mask). --cold has
the system forget the .idx before.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.index_file import MAGIC, VERSION

_REPO = Path(__file__).resolve().parent.parent
_BLOCK = 1 << 20
_LONGEST = 2000
_UINT16 = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` describes; return the exit status."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prefix = f"{folder}/many"
        write_index(prefix, args.documents)
        found = {}
        for ranks in args.ranks:
            if args.cold:
                forget(Path(f"{prefix}.idx"))
            found[ranks] = open_on(ranks, prefix, Path(folder))
    print(_table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.index_startup", description=__doc__)
    parser.add_argument("--work", default=None, help="where the files go (the system's own place)")
    parser.add_argument(
        "--documents", type=int, default=100_000_000, help="in the index (%(default)s)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--cold", action="store_true", help="read the index from the disk")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    return parser


def write_index(prefix: str, documents: int) -> None:
    """Write a token file of zeros whose documents have 1 to 2,000 tokens, in turn."""
    tokens = 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, _UINT16, documents, documents + 1))
        for at in range(0, documents, _BLOCK):
            file.write(_lengths(at, documents).astype("<i4").tobytes())
        for at in range(0, documents, _BLOCK):
            lengths = _lengths(at, documents)
            ends = tokens + np.cumsum(lengths)
            file.write(((ends - lengths) * 2).astype("<i8").tobytes())
            tokens = int(ends[-1])
        for at in range(0, documents + 1, _BLOCK):
            file.write(np.arange(at, min(at + _BLOCK, documents + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)


def _lengths(at: int, documents: int) -> npt.NDArray[np.int64]:
    """Return the tokens of the documents of a block."""
    return np.arange(at, min(at + _BLOCK, documents), dtype=np.int64) % _LONGEST + 1


def forget(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_on(ranks: int, prefix: str, out: Path) -> list[dict[str, float]]:
    """Open a token file on several ranks; return the figures of each."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "benchmarks.index_startup_rank", str(out)),
        *("--device", "cpu", "--num-layers", "1", "--hidden-size", "64"),
        *("--num-attention-heads", "4", "--num-experts", "4", "--moe-router-topk", "2"),
        *("--moe-ffn-hidden-size", "64", "--vocab-size", "50304", "--seq-length", "4096"),
        *("--micro-batch-size", "1", "--global-batch-size", str(ranks), "--train-iters", "1"),
        *("--data-path", prefix, "--split", "99,1", "--reset-attention-mask"),
    ]
    done = subprocess.run(command, cwd=_REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _table(found: dict[int, list[dict[str, float]]]) -> str:
    lines = [
        "| ranks | rank | opened after, s | peak growth, MB | kept, own memory, MB"
        " | borders of a window, us |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, each in found.items():
        for rank, figures in enumerate(each):
            lines.append(
                f"| {ranks} | {rank} | {figures['seconds']:.2f} | {figures['peak_bytes'] / 1e6:.0f}"
                f" | {figures['own_bytes'] / 1e6:.0f} | {figures['window_us']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
