"""Trains a model of transformers with a plain loop, and prints a line a step.

The peer of `pretrain_turns`: SDPA, transformers' own loss, clipping, torch's fused AdamW. Imports
torch, transformers and numpy alone, so that its memory is its own.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KINDS = ("fp32", "bf16", "autocast")
"""All in fp32, all in bf16, or fp32 weights under autocast to bf16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` says; return the exit status."""
    from transformers import AutoConfig, AutoModelForCausalLM

    args = _parser().parse_args(argv)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if args.kind == "bf16" else torch.float32
    config = AutoConfig.from_pretrained(args.config)
    config._attn_implementation, config._experts_implementation = "sdpa", args.experts
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    batches = read_batches(args.tokens, args.micro_batch_size, args.seq_length)
    for step in range(1, args.train_iters + 1):
        optimizer.zero_grad(set_to_none=True)
        tokens, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.kind == "autocast"):
            loss = model(tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"iteration {step}/{args.train_iters} | loss {loss.item():.4f}", flush=True)
    return 0


def read_batches(path: Path, number: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and labels [number, length] from a file of uint16, each token once."""
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    window = number * length
    for start in range(0, len(ids) - window, window):
        rows = torch.from_numpy(ids[start : start + window + 1].astype(np.int64))
        yield rows[:-1].view(number, length), rows[1:].view(number, length)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="transformers_loop", description=__doc__)
    parser.add_argument("--config", required=True, metavar="DIR", help="with a config.json")
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="of uint16")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what is in bf16")
    parser.add_argument("--experts", default="grouped_mm", help="implementation (%(default)s)")
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--train-iters", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
