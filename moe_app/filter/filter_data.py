"""Filter and deduplicate documents before they are tokenized.

    python tools/filter_data.py --input web/*.jsonl.zst --output filtered --workers 2 \
        --tokenizer-type HFTokenizer --tokenizer-model tokenizer.json \
        --filter repeated-ngram --filter length:min=100 --filter exact --filter minhash

Filters apply in the order given. Kept documents are in OUTPUT/kept/NAME.jsonl, as they were read;
dropped ones in OUTPUT/dropped/NAME.jsonl with a `reason`; counts in OUTPUT/summary.json. The output
depends on the input and the filters alone. Started again, the command does what is missing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.data.tokenizer import TOKENIZER_CHOICES
from megatron.trainer.errors import ConfigError, UserError, printable
from moe_app.command_line import program
from moe_app.filter.filter_plan import make_plan, settle_plan
from moe_app.filter.filter_specs import FILTERS, parse_filter
from moe_app.filter.filter_summary import summary_table
from moe_app.filter.work_folder import WorkFolder


def run_filters(args: argparse.Namespace) -> None:
    """Make the corpus that the command line describes, and print the counts.

    Raises:
        UserError: The command line, the input or what is in the output folder is wrong.
        OSError: A file cannot be read or written.
    """
    for each in args.input:
        if Path(each).is_dir() and Path(args.output).resolve().is_relative_to(Path(each).resolve()):
            raise ConfigError(
                f"--output {args.output} is in --input {each}, whose files are read; the output"
                " must be outside; choose another folder"
            )
    plan = make_plan(
        inputs=args.input,
        text_key=args.text_key,
        filters=[parse_filter(each) for each in args.filter],
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        max_bad_lines=args.max_bad_lines,
    )
    folder = WorkFolder(Path(args.output).absolute())
    for path in (folder.output, folder.kept, folder.dropped):
        if path.is_symlink() and path != folder.output:
            raise ConfigError(
                f"{path} is a link; what is written must stay in --output; remove the link"
            )
    folder.output.mkdir(parents=True, exist_ok=True)
    settle_plan(plan, folder.output)
    try:
        from moe_app.filter.pipeline.document_filters import check_tokenizer
        from moe_app.filter.pipeline.executors import run_locally
        from moe_app.filter.pipeline.stages import build_stages
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; filters run on datatrove; install it with pip install"
            " 'megatron-moe[data]'"
        ) from error
    if plan.tokenizer is not None:
        check_tokenizer(plan.tokenizer)
    run_locally(build_stages(plan, folder), folder, workers=args.workers)
    print(summary_table(json.loads(folder.summary.read_bytes())))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("filter_data", command="filter"),
        description="Filter and deduplicate documents of JSON Lines, Parquet and Arrow files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines (plain, .gz or .zst) or Parquet files, folders or patterns of them, or"
        " directories of Dataset.save_to_disk; local paths",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or begun folder")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help=f"{', '.join(FILTERS)}; several are applied in their order",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where the text is")
    parser.add_argument(
        "--tokenizer-type",
        choices=list(TOKENIZER_CHOICES),
        default="SentencePieceTokenizer",
        help="what wrote --tokenizer-model",
    )
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="the .model or .json file that counts tokens"
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="skip and count so many lines that hold no document; one more stops with its place",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes to use")
    args = parser.parse_args(argv)
    for name, least in (("workers", 1), ("max_bad_lines", 0)):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {getattr(args, name)}; it must be at least {least}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    args = parse_args(argv)
    try:
        run_filters(args)
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0
