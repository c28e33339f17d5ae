"""Make a mixture of experts of a dense model (sparse upcycling).

    python tools/upcycle.py --load runs/dense --save runs/moe --num-experts 8 --moe-router-topk 2
    python tools/pretrain.py --load runs/moe --save runs/more ...

One process, a matrix at a time, as in conversion. The new run begins at iteration 0 without an
optimizer's state. Exit status: 0; 2 when it cannot be done.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.runtime.malloc import keep_freed_memory
from moe_app.command_line import program
from moe_app.convert.checks import DTYPES, check_new_run
from moe_app.convert.one_process import check_one_process, run_interruptible
from moe_app.infer.open_model import positive
from moe_app.upcycle.dense_source import DenseSource, open_hf, open_run
from moe_app.upcycle.first_loss import first_losses, read_windows
from moe_app.upcycle.written_run import write_run
from moe_ext.counting import count_parameters
from moe_ext.upcycling import Upcycling

logger = logging.getLogger("upcycle")

REPORT_NAME = "upcycling.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Upcycle as `argv` says; return the exit status."""
    args = make_parser().parse_args(argv)
    return run_interruptible(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog=program("upcycle"), description="Make a mixture of experts of a dense model."
    )
    model = parser.add_argument_group("dense model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", metavar="DIR", help="a run's --save directory")
    source.add_argument("--hf", metavar="DIR", help="Hugging Face directory of a LLaMA or OLMo")
    model.add_argument("--ckpt-step", type=int, metavar="N", help="iteration to load (the newest)")
    model.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=128,
        metavar="N",
        help="with --hf: pad the vocabulary to a multiple of this (%(default)s)",
    )
    experts = parser.add_argument_group("experts")
    experts.add_argument("--num-experts", type=positive, required=True, metavar="N")
    experts.add_argument("--moe-router-topk", type=positive, required=True, metavar="K")
    experts.add_argument(
        "--moe-layer-freq",
        type=positive,
        default=1,
        metavar="N",
        help="upcycle the last of each N layers, and leave the others dense (%(default)s)",
    )
    experts.add_argument(
        "--granularity",
        type=positive,
        default=1,
        metavar="G",
        help="split each feed-forward layer into so many experts (%(default)s)",
    )
    experts.add_argument(
        "--noise",
        type=_share,
        default=0.0,
        metavar="F",
        help="share of each expert's values drawn anew from N(0, 0.02); OLMoE's is 0.5 (0)",
    )
    experts.add_argument(
        "--drop",
        type=_share,
        default=0.0,
        metavar="F",
        help="share of each expert's width drawn anew, with the mean and deviation of what it"
        " replaces (0)",
    )
    experts.add_argument(
        "--shared",
        action="store_true",
        help="keep the dense layer beside its copies, as an expert that every token has",
    )
    experts.add_argument(
        "--preserve-function",
        action="store_true",
        help="divide the gates by their sum (router topk_softmax), so that the model computes what"
        " the dense one does",
    )
    experts.add_argument("--seed", type=int, default=1234, metavar="S", help="(%(default)s)")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--save", required=True, metavar="DIR", help="run directory to create; must hold no run yet"
    )
    out.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights written (as they are)")
    out.add_argument(
        "--data-path",
        metavar="PREFIX",
        help="tokens on which to predict and measure the first loss",
    )
    out.add_argument(
        "--check-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="of them, in windows of the model's sequence length (%(default)s)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Upcycle, and measure the first loss if there is text; return the exit status.

    Raises:
        UserError: a flag, the source or the disk is unsuitable.
    """
    configure_logging(0)
    check_one_process("upcycling")
    save = Path(args.save)
    check_new_run(save)
    rule = Upcycling(
        num_experts=args.num_experts,
        topk=args.moe_router_topk,
        granularity=args.granularity,
        noise=args.noise,
        drop=args.drop,
        shared=args.shared,
        preserve_function=args.preserve_function,
        layer_freq=args.moe_layer_freq,
        seed=args.seed,
    )
    keep_freed_memory()
    with _open(args, save) as source:
        try:
            model = rule.model(source.cfg.model)
        except ValueError as error:
            raise ConfigError(f"{source.path}: {error}") from error
        windows = None
        if args.data_path is not None:
            windows = read_windows(
                args.data_path,
                seq_length=source.cfg.training.seq_length,
                num_tokens=args.check_tokens,
                vocab_size=model.vocab_size,
            )
        write_run(source, rule, model, save)
        counts = count_parameters(model)
        report: dict[str, Any] = {
            "source": str(source.path),
            "rule": asdict(rule),
            "parameters": counts.total,
            "active_parameters": counts.active,
        }
        logger.info(
            "%s: %d layers of %d experts from %s, %.2f million parameters, %.2f million active",
            *(save, model.num_moe_layers, rule.num_experts, source.path),
            *(counts.total / 1e6, counts.active / 1e6),
        )
        if windows is not None:
            report["first_loss"] = losses = first_losses(source, save, rule, windows)
            logger.info(
                "loss of %d tokens: dense %.4f, predicted %.4f%s, measured %.4f",
                windows[:, 1:].numel(),
                losses["dense"],
                losses["predicted"],
                " (without noise and drop)" if rule.noise or rule.drop else "",
                losses["measured"],
            )
    write_text(save / REPORT_NAME, json.dumps(report, indent=2) + "\n", durable=True)
    return 0


def _open(args: argparse.Namespace, save: Path) -> AbstractContextManager[DenseSource]:
    if args.hf is None:
        return open_run(
            Path(args.load),
            iteration=args.ckpt_step,
            dtype=args.dtype,
            prog=program("upcycle"),
        )
    return open_hf(
        Path(args.hf), save=save, dtype=args.dtype, divisor=args.make_vocab_size_divisible_by
    )


def _share(text: str) -> float:
    """Parse a share, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be from 0 to 1")
    return value
