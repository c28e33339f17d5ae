"""Defines the flags that train_step and moe_layer share."""

import argparse
from fnmatch import fnmatchcase
from typing import TypeVar

import torch

from benchmarks.shapes import SHAPES, Shape, resize

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows of the GEMM that is the ceiling, by device."""
_WILD = set("*?[")


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Build a parser with the common flags."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="(%(default)s)")
    parser.add_argument("--num-layers", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--seq-length", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="override the shape's")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="rebuild an implementation for each visit, so that only one is in memory at a time",
    )
    parser.add_argument(
        "--peer-timeout", type=float, default=600.0, metavar="SECONDS",
        help="leave a peer out whose building and comparison, or whose sample, takes longer"
        " (%(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gemm-size", type=int, metavar="N",
        help=f"rows of the GEMM that is the ceiling (cpu {GEMM_SIZE['cpu']},"
        f" cuda {GEMM_SIZE['cuda']})",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="implementations to measure, by their names in the table or shell patterns of names",
    )
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    return parser


def shape_of(args: argparse.Namespace) -> Shape:
    """Return the shape that the flags describe."""
    return resize(
        SHAPES[args.shape],
        num_layers=args.num_layers,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
    )


def gemm_size(args: argparse.Namespace) -> int:
    """Return the size of the GEMM that is the ceiling."""
    return args.gemm_size or GEMM_SIZE[args.device]


def chosen(entries: dict[str, T], only: list[str] | None) -> dict[str, T]:
    """Select the implementations that --only names, in the order of the table.

    Raises:
        SystemExit: a name is unknown.
    """
    if only is None:
        return entries
    # What a pattern stands for depends on the machine; a name has to be there.
    unknown = sorted({each for each in only if not _WILD & set(each)} - entries.keys())
    if unknown:
        raise SystemExit(f"unknown implementation {unknown[0]}; use {', '.join(entries)}")
    return {
        name: value
        for name, value in entries.items()
        if any(fnmatchcase(name, pattern) for pattern in only)
    }
