"""Report what data hold: tokens, documents, lengths, duplicates, languages, per source.

    python tools/report_data.py --token-file data/code_text_document --input web/*.jsonl.zst \
        --output report

A source is a token file or an input of texts. OUTPUT gets report.html, which needs nothing else,
and report.json. Documents are read one at a time; duplicates take 16 bytes a document of one source
at a time in memory, and as much on disk.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.token_manifest import check_facts, read_manifest
from megatron.trainer.data.tokenizer import TOKENIZER_CHOICES, Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError, UserError, printable
from megatron.trainer.io.atomic_write import write_text
from moe_app.command_line import argument_text, program
from moe_app.data.sources import find_sources
from moe_app.filter.data_counts import DataCounts, count_repeated
from moe_app.filter.records import BadEntry, read_entries
from moe_app.plain_page import plain_page, plain_table, share_bar

_BLOCK_DOCUMENTS = 1 << 14
_COLUMNS = (
    *("source", "documents", "empty", "duplicates", "tokens", "text_bytes"),
    *("bytes_per_token", "length_mean", "length_shortest", "length_longest"),
)


def report_token_file(prefix: str, digests: BinaryIO | None) -> DataCounts:
    """Count the documents of a token file, which is verified.

    Raises:
        DataError: It is missing or damaged, or its manifest is of another one.
    """
    file = open_tokens(prefix)
    manifest = read_manifest(prefix)
    counts = DataCounts(name=prefix, unit="tokens", digests=digests, tokens=file.num_tokens)
    if manifest is not None:
        check_facts(prefix, manifest, file.facts)
        counts.text_bytes = manifest.num_text_bytes
    for begin in range(0, file.num_documents, _BLOCK_DOCUMENTS):
        starts = file.document_starts[begin : begin + _BLOCK_DOCUMENTS].tolist()
        stops = [*starts[1:], file.document_starts.bound(begin + len(starts))]
        for start, stop in zip(starts, stops, strict=True):
            counts.add(file.tokens[start:stop].tobytes(), stop - start)
    return counts


def report_texts(
    path: str, args: argparse.Namespace, tokenizer: Tokenizer | None, digests: BinaryIO | None
) -> DataCounts:
    """Count the documents of an input of texts.

    Raises:
        DataError: It cannot be read, or has more bad lines than --max-bad-lines.
    """
    counts = DataCounts(name=path, unit="bytes", digests=digests, text_bytes=0)
    counts.tokens = None if tokenizer is None else 0
    for source in find_sources([path]):
        for entry in read_entries(source, text_key=args.text_key):
            if isinstance(entry, BadEntry):
                counts.bad_lines += 1
                if counts.bad_lines > args.max_bad_lines:
                    raise DataError(
                        f"{entry.problem}; that is bad line {counts.bad_lines} of {path}, more than"
                        f" --max-bad-lines {args.max_bad_lines}"
                    )
                continue
            content = entry.text.encode("utf-8")
            counts.add(content, len(content))
            counts.add_language(entry.value, len(content))
            counts.text_bytes = (counts.text_bytes or 0) + len(content)
            if tokenizer is not None:
                counts.tokens = (counts.tokens or 0) + len(tokenizer.encode_document(entry.text))
    return counts


def make_report(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the summary of each source that the command line names.

    Raises:
        UserError: A source cannot be read.
    """
    tokenizer = None
    if args.tokenizer_model is not None:
        tokenizer = load_tokenizer(
            args.tokenizer_type, args.tokenizer_model, eod_token=args.eod_token
        )
    found = []
    for is_text, name in chain(
        ((False, each) for each in args.token_file), ((True, each) for each in args.input)
    ):
        with tempfile.TemporaryFile() as file:
            digests = None if args.no_duplicates else file
            if is_text:
                counts = report_texts(name, args, tokenizer, digests)
            else:
                counts = report_token_file(name, digests)
            if digests is not None:
                counts.duplicates = count_repeated(digests)
        found.append(counts.summary())
    return found


def report_page(sources: Sequence[dict[str, Any]]) -> str:
    """Return the page; whatever the sources hold is shown as text."""
    rows = [[each[key] for key in _COLUMNS] for each in sources]
    tables = [plain_table("Sources", _heads(), rows)]
    for each in sources:
        most = max((row["documents"] for row in each["lengths"]), default=1)
        lengths = [
            [f"{row['from']:,} to {row['to']:,}", count, share_bar(count / most)]
            for row in each["lengths"]
            for count in (row["documents"],)
        ]
        title = f"Lengths in {each['length_unit']}: {each['source']}"
        tables.append(plain_table(title, ["length", "documents", ""], lengths))
        size = max((row["text_bytes"] for row in each["languages"]), default=0) or 1
        languages = [
            [row["extension"], row["documents"], count, share_bar(count / size)]
            for row in each["languages"]
            for count in (row["text_bytes"],)
        ]
        title = f"Languages by extension: {each['source']}"
        tables.append(plain_table(title, ["extension", "documents", "bytes", ""], languages))
    return plain_page("Data", tables)


def report_table(sources: Sequence[dict[str, Any]]) -> str:
    """Return the table for a terminal: a row for each source."""
    rows = [_heads(), *([_shown(each[key]) for key in _COLUMNS] for each in sources)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _heads() -> list[str]:
    return [key.replace("_", " ") for key in _COLUMNS]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def parse_report_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("report_data", command="report-data"),
        description="Report what token files and texts hold, per source.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--token-file", nargs="+", default=[], metavar="PREFIX", help="without .bin and .idx"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="JSON Lines (plain, gzip, zstd), Parquet, a folder of them, a dataset on disk",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="of the page and the JSON")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where the text is")
    parser.add_argument(
        "--max-bad-lines", type=int, default=0, metavar="N", help="skipped in each input"
    )
    parser.add_argument(
        "--no-duplicates", action="store_true", help="save 16 bytes of memory a document"
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_CHOICES,
        default="SentencePieceTokenizer",
        help="what wrote --tokenizer-model",
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help="counts tokens of texts too")
    parser.add_argument(
        "--eod-token",
        type=argument_text,
        metavar="TEXT",
        help="the token that ends a document, where the tokenizer's files name none",
    )
    args = parser.parse_args(argv)
    if not args.token_file and not args.input:
        parser.error("neither --token-file nor --input is given; name at least one source")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    args = parse_report_args(argv)
    try:
        sources = make_report(args)
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "report.json", json.dumps({"sources": sources}, indent=1) + "\n")
        write_text(output / "report.html", report_page(sources))
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(report_table(sources))
    return 0
