"""Tokenize JSON Lines into token files: PREFIX_KEY_document.bin and .idx.

    python tools/preprocess_data.py --input code.jsonl docs.jsonl --output-prefix data/corpus \
        --tokenizer-model data/tokenizer.model --append-eod --workers 2

An input may be a file, a folder, a pipe or `-` for standard input, plain or compressed with gzip or
zstd. The output depends on the input and the tokenizer alone, not on the number of workers. Beside
it, PREFIX_KEY_document.json says which tokenizer wrote it; pretraining compares it with its own.
Started again after a kill, the command does what is missing. Many nodes write a shard each
(`--num-shards`, `--shard-index`), and `--merge` joins these.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron.trainer.data.text_input import TextInput
from megatron.trainer.data.token_manifest import identify_tokenizer, read_manifest
from megatron.trainer.data.tokenizer import TOKENIZER_CHOICES, describe_ends
from megatron.trainer.errors import UserError, printable
from moe_app.command_line import argument_text, program
from moe_app.data.encoding import open_tokenizer
from moe_app.data.shards import merge_shards
from moe_app.data.sources import refuse_inside
from moe_app.data.text_inputs import cut_shard, find_inputs
from moe_app.data.token_work import TokenWork, digest, write_tokens


def preprocess(args: argparse.Namespace) -> bool:
    """Write, merge or check the token files of all keys; return whether they are there now.

    Raises:
        UserError: The input, the tokenizer or the output is missing or bad.
    """
    if args.merge:
        for key in args.json_keys:
            whole = f"{args.output_prefix}_{args.output_key or key}_document"
            merge_shards(whole, count=args.num_shards)
        return True
    folder = Path(args.output_prefix).absolute().parent
    refuse_inside(folder, args.input, output=f"--output-prefix {args.output_prefix}")
    inputs = find_inputs(args.input)
    segments = cut_shard(inputs, index=args.shard_index, count=args.num_shards)
    texts = {
        place: TextInput(each.path, is_reread=len(args.json_keys) > 1)
        for place, each in enumerate(inputs)
        if not each.is_plain
    }
    identity = identify_tokenizer(args.tokenizer_type, args.tokenizer_model)
    tokenizer = open_tokenizer(args)
    print(describe_ends(tokenizer))
    works = [
        TokenWork(
            args=args,
            key=key,
            inputs=inputs,
            segments=segments,
            inputs_sha256=digest([[each.path, each.num_bytes, each.sha256] for each in inputs]),
            num_inputs=len(inputs),
            texts=texts,
            tokenizer=tokenizer,
            identity=identity,
        )
        for key in args.json_keys
    ]
    if args.check:
        return all(map(_is_written, works))
    for work in works:
        write_tokens(work)
    return True


def _is_written(work: TokenWork) -> bool:
    """Print and return whether a token file is finished and is what this command would write.

    Raises:
        DataError: Where the manifest belongs is a file that is none.
    """
    manifest = read_manifest(work.prefix)
    missing = work.missing(manifest) if manifest is not None else "there is no finished one"
    print(f"{work.prefix}: {f'not what this command writes: {missing}' if missing else 'complete'}")
    return missing is None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("preprocess_data", command="preprocess"),
        description="Turn JSON Lines into token files that the trainer reads with --data-path.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON Lines files, or folders or patterns of them, read in order; plain, gzip or"
        " zstd; - is standard input",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        type=argument_text,
        default=["text"],
        metavar="KEY",
        help="one token file for each",
    )
    parser.add_argument(
        "--output-key",
        type=argument_text,
        metavar="NAME",
        help="name the token files PREFIX_NAME_document; for one key",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="the token files are PREFIX_KEY_document.bin and .idx",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_CHOICES,
        default="SentencePieceTokenizer",
        help="what wrote --tokenizer-model",
    )
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="the .model or .json file, or a directory that holds it",
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the token for it"
    )
    parser.add_argument(
        "--eod-token",
        type=argument_text,
        metavar="TEXT",
        help="the token that ends a document; without it, the one that the tokenizer's files name",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes to use")
    parser.add_argument(
        "--num-shards",
        type=int,
        default=1,
        metavar="N",
        help="cut the input into N parts, of which this command writes one",
    )
    parser.add_argument(
        "--shard-index", type=int, metavar="I", help="which part to write, from 0 to N - 1"
    )
    parser.add_argument(
        "--merge", action="store_true", help="join the N finished parts, which stay as they are"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; end with 0 where this command's token files are finished, else with 1",
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="skip and count so many lines that hold no document; one more stops with its place",
    )
    args = parser.parse_args(argv)
    for name, least in (("workers", 1), ("num_shards", 1), ("max_bad_lines", 0)):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {getattr(args, name)}; it must be at least {least}")
    _check_shards(parser, args)
    return args


def _check_shards(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage message where flags do not fit together."""
    if args.output_key is not None and len(args.json_keys) > 1:
        parser.error(
            f"--output-key {args.output_key} is a name for the token files of one key, but"
            f" --json-keys has {len(args.json_keys)}; leave one of the flags out"
        )
    if args.merge:
        if args.input or args.shard_index is not None or args.num_shards == 1 or args.check:
            parser.error(
                "--merge takes --output-prefix, --json-keys and --num-shards, at least 2, as the"
                " shards were written with; leave --input, --shard-index and --check out"
            )
        return
    for name in ("input", "tokenizer_model"):
        if not getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is missing; give it")
    if args.shard_index is None:
        if args.num_shards > 1:
            parser.error(
                f"--num-shards is {args.num_shards}, but --shard-index is not given; it says which"
                " part to write, or --merge joins them"
            )
        args.shard_index = 0
    if not 0 <= args.shard_index < args.num_shards:
        parser.error(
            f"--shard-index is {args.shard_index}; it must be from 0 to {args.num_shards - 1}, one"
            " less than --num-shards"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, 1 where a check found less, or 2 after printing what is wrong."""
    args = parse_args(argv)
    try:
        return 0 if preprocess(args) else 1
    except BrokenProcessPool as error:
        print(f"error: a worker process died ({error}); use fewer --workers", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; started again, the command does what is missing", file=sys.stderr)
        return 130
