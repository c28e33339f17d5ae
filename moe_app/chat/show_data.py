"""Show what a model sees of conversation data: the texts, and which of their tokens count.

    megatron-moe show-data --train-data chat.jsonl --template olmoe -n 5 \
        --tokenizer-type HFTokenizer --tokenizer-model DIR

What counts is green in a terminal, and in 【brackets】 elsewhere. Nothing is written.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from megatron.trainer.data.tokenizer import TOKENIZER_CHOICES
from megatron.trainer.errors import DataError, printable
from moe_app.chat.chat_cache import TokenizerChoice, open_template
from moe_app.chat.chat_config import ChatDataConfig, Overlong
from moe_app.chat.chat_files import BadRows, find_chat_files
from moe_app.chat.chat_rows import Unit
from moe_app.chat.chat_tokens import RowCounts, encoded_units
from moe_app.chat.dialogue import ChatKind, TrainOn
from moe_app.chat.parallel_encoding import encode_here
from moe_app.chat.samples import DialogueEncoder, Reading, Sample
from moe_app.chat.templates import TEMPLATES
from moe_app.command_line import argument_text, program, report_errors

_GREEN, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_TITLES = {"sft": ("conversation",), "preference": ("chosen", "rejected"), "kto": ("completion",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = make_parser().parse_args(argv)
    return report_errors(lambda: show(args))


def show(args: argparse.Namespace) -> None:
    """Print the first texts of the data.

    Raises:
        UserError: The data or the tokenizer cannot be read, or no row is left.
    """
    names = {each.name for each in dataclasses.fields(ChatDataConfig)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    cfg = ChatDataConfig(**{**settings, "train_data": tuple(args.train_data)})
    kind: ChatKind = args.kind
    cfg.check(kind)
    choice = TokenizerChoice(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        eod_token=args.eod_token,
    )
    files = find_chat_files(cfg.train_data, flag="--train-data")
    counts, bad = RowCounts(), BadRows(cfg.max_bad_rows)
    with contextlib.closing(open_template(cfg, choice)) as template:
        encoder = DialogueEncoder(
            tokenizer=choice.tokenizer,
            template=template,
            train_on=cfg.train_on,
            seq_length=args.seq_length,
            overlong=cfg.overlong,
        )
        units = encoded_units(
            files, kind, cfg, functools.partial(encode_here, encoder), counts=counts, bad=bad
        )
        for where, unit, samples in itertools.islice(units, args.num_rows):
            for line in _described(where, unit, samples, encoder, args):
                print(line)
    if not counts.rows:
        raise DataError(
            f"{' '.join(cfg.train_data)}: no row is left: {bad.count} hold no conversation,"
            f" {counts.overlong} have more than --seq-length {args.seq_length} tokens; raise that,"
            " or give other data"
        )
    print(
        f"rows shown: {counts.rows}; before the last of them, too long: {counts.overlong}, without"
        f" a conversation: {bad.count}"
    )


def _described(
    where: str,
    unit: Unit,
    samples: Sequence[Sample],
    encoder: DialogueEncoder,
    args: argparse.Namespace,
) -> Iterator[str]:
    """Yield the lines that show one row."""
    titles = _TITLES[args.kind]
    for title, dialogue, sample in zip(titles, unit.dialogues, samples, strict=True):
        judged = {None: "", True: ", desirable", False: ", undesirable"}[unit.label]
        cut = ", cut" if sample.is_cut else ""
        size = f"{len(sample.ids)} tokens{cut}, {sample.num_counted} count"
        yield printable(f"── {where}: {title}{judged}, {size}")
        reading = encoder.read(dialogue).cut(len(sample.ids))
        yield from _token_lines(reading) if args.token_ids else [_marked(reading)]
        yield ""


def _marked(reading: Reading) -> str:
    """Return a text in which the characters of tokens that count are marked."""
    counted = [False] * len(reading.text)
    for (first, last), is_counted in zip(reading.offsets, reading.sample.counted, strict=True):
        if is_counted:
            counted[first:last] = [True] * (last - first)
    pieces = []
    for is_counted, group in itertools.groupby(
        zip(counted, reading.text, strict=True), key=lambda pair: pair[0]
    ):
        piece = printable("".join(character for _, character in group))
        pieces.append(_highlighted(piece) if is_counted else piece)
    return "".join(pieces)


def _token_lines(reading: Reading) -> Iterator[str]:
    """Yield a line for each token: its id, what of the text it is, and whether it counts."""
    for token_id, (first, last), is_counted in zip(
        reading.sample.ids.tolist(), reading.offsets, reading.sample.counted, strict=True
    ):
        piece = repr(reading.text[first:last])
        yield f"{token_id:>8}  {_highlighted(piece) if is_counted else piece}"


def _highlighted(text: str) -> str:
    return f"{_GREEN}{text}{_PLAIN}" if sys.stdout.isatty() else f"【{text}】"


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("show_data", command="show-data"),
        description="Print what a model sees of conversation data, and which tokens count.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
            prog, width=shutil.get_terminal_size().columns
        ),
    )
    defaults = ChatDataConfig()

    def add(name: str, **options: Any) -> None:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=getattr(defaults, name), **options)

    parser.add_argument(
        "--train-data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines, Parquet, folders of them, or a dataset on disk",
    )
    parser.add_argument(
        "--kind", choices=get_args(ChatKind), default="sft", help="what the rows hold"
    )
    parser.add_argument("-n", "--num-rows", type=_positive, default=5, metavar="N", help="rows")
    parser.add_argument("--token-ids", action="store_true", help="print a line for each token")
    add("template", choices=(*TEMPLATES, "tokenizer"), help="what makes a text of a conversation")
    add("train_on", choices=get_args(TrainOn), help="which tokens count")
    add("overlong", choices=get_args(Overlong), help="what is done with too long texts")
    add("max_bad_rows", type=int, metavar="N", help="rows that may hold no conversation")
    for each in dataclasses.fields(ChatDataConfig):
        if each.name.endswith("_key"):
            add(each.name, type=argument_text, metavar="KEY", help="name of this field in a row")
    parser.add_argument(
        "--seq-length", type=_positive, default=4096, metavar="N", help="tokens of a text"
    )
    parser.add_argument(
        "--tokenizer-type", choices=TOKENIZER_CHOICES, default="HFTokenizer", help="its kind"
    )
    parser.add_argument(
        "--tokenizer-model", required=True, metavar="PATH", help="its file or directory"
    )
    parser.add_argument(
        "--eod-token", type=argument_text, metavar="TEXT", help="the token that ends a text"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
