"""Declares the command line of a conversion."""

import argparse
from collections.abc import Sequence

from moe_app.chat.prompting import TEMPLATE_NAMES
from moe_app.command_line import program
from moe_app.convert.chat_template import NO_TEMPLATE
from moe_app.convert.checks import DTYPES


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("convert_checkpoint", command="convert"),
        description="Convert OLMoE, JetMoE and OLMo checkpoints between Hugging Face's form and"
        " ours.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face -> a checkpoint to train from")
    importing.add_argument(
        "--hf",
        required=True,
        metavar="DIR",
        help="directory with config.json and safetensors to read",
    )
    importing.add_argument(
        "--save", required=True, metavar="DIR", help="run directory to create; must hold no run yet"
    )
    importing.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of this, for tensor parallelism (%(default)s)",
    )
    exporting = commands.add_parser("export", help="a run's checkpoint -> Hugging Face")
    exporting.add_argument("--load", required=True, metavar="DIR", help="a run's --save directory")
    exporting.add_argument(
        "--iteration", type=int, metavar="N", help="checkpoint to export; the newest by default"
    )
    exporting.add_argument("--hf", required=True, metavar="DIR", help="directory to create")
    exporting.add_argument(
        "--layout",
        choices=("per-expert", "fused"),
        help="one tensor per expert, or one for all experts of a layer (default: the family's)",
    )
    exporting.add_argument(
        "--like",
        metavar="DIR",
        help="Hugging Face directory to take tokenizer and special token ids from",
    )
    exporting.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="export without a tokenizer, where none gives the ids that the model was trained on",
    )
    exporting.add_argument(
        "--chat-template",
        choices=(*TEMPLATE_NAMES, NO_TEMPLATE),
        help="write this template for conversations, or the tokenizer's own, or none (that which"
        " the run was fine-tuned with; others keep what the tokenizer has)",
    )
    exporting.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a run with --lora-rank as peft loads them, not the model; else"
        " they are merged into its weights",
    )
    exporting.add_argument(
        "--base", metavar="NAME", help="with --adapter: the model below, a directory or Hub id"
    )
    exporting.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file (%(default)s)"
    )
    for command in (importing, exporting):
        command.add_argument(
            "--dtype", choices=tuple(DTYPES), help="of the weights written (as they are)"
        )
        command.add_argument(
            "--checksums",
            action="store_true",
            help="put the SHA-256 of every Hugging Face tensor into the report",
        )
        command.add_argument(
            "--verify",
            action="store_true",
            help="run both models on the same tokens and compare their logits; for exports,"
            " the tokenizers, too; needs transformers; implies --checksums",
        )
    args = parser.parse_args(argv)
    if args.command == "export" and args.chat_template and (args.no_tokenizer or args.adapter):
        exporting.error(
            "--chat-template goes with a tokenizer; drop it, or --no-tokenizer and --adapter"
        )
    return args
