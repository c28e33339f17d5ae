"""Filter and deduplicate documents before they are tokenized.

    python tools/filter_data.py --input web/*.jsonl.zst --output filtered --workers 2 \
        --tokenizer-type HFTokenizer --tokenizer-model tokenizer.json \
        --filter repeated-ngram --filter length:min=100 --filter exact --filter minhash

Filters apply in the order given. Kept documents are in OUTPUT/kept/NAME.jsonl, as they were read;
dropped ones in OUTPUT/dropped/NAME.jsonl with a `reason`; token files of the kept ones, if
`--tokenize` asks for them, in OUTPUT/tokens; counts in OUTPUT/summary.json. The output depends on
the input and the filters alone. Started again, the command does what is missing.
"""

import argparse
import contextlib
import errno
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.trainer.data.tokenizer import TOKENIZER_CHOICES
from megatron.trainer.errors import ConfigError, DataError, UserError, printable
from moe_app.command_line import argument_text, program
from moe_app.data.sources import refuse_inside
from moe_app.filter.filter_plan import TokenSettings, make_plan, settle_plan
from moe_app.filter.filter_recipe import read_filter_recipe
from moe_app.filter.filter_specs import FILTERS, parse_filter
from moe_app.filter.filter_summary import summary_table
from moe_app.filter.submissions import refuse_queued
from moe_app.filter.work_folder import WorkFolder

EXECUTORS = ("local", "slurm", "ray")


def run_filters(args: argparse.Namespace) -> None:
    """Make the corpus that the command line describes, and print the counts.

    Raises:
        UserError: The command line, the input or what is in the output folder is wrong.
        OSError: A file cannot be read or written.
    """
    folder = WorkFolder(Path(args.output).absolute())
    if args.run_stage:
        with _needs_datatrove():
            from moe_app.filter.pipeline.dispatch import run_array_task
        with _names_full_disk(folder.output):
            run_array_task(folder, args)
        return
    _check_output(args.output, args.input)
    plan = make_plan(
        inputs=args.input,
        text_key=args.text_key,
        filters=[parse_filter(each) for each in args.filter] or args.filters,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        max_bad_lines=args.max_bad_lines,
        eod_token=args.eod_token,
        tokens=_token_settings(args),
    )
    with _names_full_disk(folder.output):
        folder.output.mkdir(parents=True, exist_ok=True)
        refuse_queued(folder)
        settle_plan(plan, folder.output)
        with _needs_datatrove():
            from moe_app.filter.pipeline.dispatch import run_plan
        is_complete = run_plan(plan, folder, args)
    if is_complete:
        print(summary_table(json.loads(folder.summary.read_bytes())))


def _token_settings(args: argparse.Namespace) -> TokenSettings | None:
    """Return how kept documents are tokenized.

    Raises:
        ConfigError: They are not, but a flag says how.
    """
    if args.tokenize:
        return TokenSettings(append_eod=args.append_eod, eod_token=args.eod_token)
    if args.append_eod:
        raise ConfigError(
            "--append-eod says how documents are tokenized, but they are not; add --tokenize, or"
            " leave it out"
        )
    return None


def _check_output(output: str, inputs: Sequence[str]) -> None:
    """Check that the output is a folder, not where input is read, nor behind a link.

    Raises:
        ConfigError: It is not.
    """
    refuse_inside(Path(output), inputs, output=f"--output {output}")
    folder = WorkFolder(Path(output))
    if folder.output.exists() and not folder.output.is_dir():
        raise ConfigError(f"--output {output} is no folder; name a new or begun one")
    for path in (folder.kept, folder.dropped, folder.tokens, folder.work):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link; what is written must stay in --output; remove the link"
            )


@contextlib.contextmanager
def _names_full_disk(output: Path) -> Iterator[None]:
    """Name the folder where there is no room left: a failed write names no file.

    Raises:
        DataError: There is none.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"--output {output} has no room left ({error.strerror}); make room and start again:"
                " what is finished stays"
            ) from error
        raise


@contextlib.contextmanager
def _needs_datatrove() -> Iterator[None]:
    """Name the extra to install where datatrove is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; filters run on datatrove; install it with pip install"
            " 'megatron-moe[data]'"
        ) from error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program("filter_data", command="filter"),
        description="Filter and deduplicate documents of JSON Lines, Parquet and Arrow files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="a YAML file of these settings; flags go before it"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON Lines (plain, .gz or .zst) or Parquet files, folders or patterns of them, or"
        " directories of Dataset.save_to_disk; local paths",
    )
    parser.add_argument("--output", metavar="DIR", help="a new or begun folder")
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
        "--tokenize",
        action="store_true",
        help="write the kept documents of each file as a shard of token files, too",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each with the token for it")
    parser.add_argument(
        "--eod-token",
        metavar="TEXT",
        type=argument_text,
        help="that token; without it, the one that the tokenizer's files name",
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="skip and count so many lines that hold no document; one more stops with its place",
    )
    parser.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="processes of this machine, SLURM arrays, or a Ray cluster",
    )
    parser.add_argument(
        "--tasks", type=int, metavar="N", help="jobs of a stage at most; a file each without it"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="how many run at the same time: 1 on this machine, any number on a cluster",
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of sbatch, such as partition=cpu",
    )
    for flag in ("--run-stage", "--submission"):
        parser.add_argument(flag, default="", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    parser.set_defaults(filters=[])
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and the recipe that it names.

    Raises:
        ConfigError: The recipe is wrong.
        OSError: It cannot be read.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.recipe:
        parser.set_defaults(**read_filter_recipe(args.recipe))
        args = parser.parse_args(argv)
    for name in ("output", *(() if args.run_stage else ("input",))):
        if not getattr(args, name):
            parser.error(f"--{name} is missing; give it, here or in a recipe")
    if args.executor not in EXECUTORS:
        parser.error(f"executor is {args.executor!r}; it must be one of {', '.join(EXECUTORS)}")
    for name, least in (("tasks", 1), ("workers", 1), ("max_bad_lines", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {value}; it must be at least {least}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    try:
        run_filters(parse_args(argv))
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0
