"""Make a small, real corpus without a network: the standard library of the running Python.

    python tools/build_corpus.py --output-dir data

Writes code.jsonl (its sources, one document a file) and docs.jsonl (the language reference that
`help()` shows, one document a topic, and the docstrings, one document a module), two domains for
blends and for studying which experts serve which. Sources are read and parsed, never imported. The
order is shuffled with a fixed seed: the same Python gives the same files.
"""

import argparse
import ast
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.errors import DataError, UserError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.command_line import program

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
)
_LARGEST_FILE_BYTES = 500_000
_SEED = 20240903
_TOPICS = "pydoc_data/topics.py"


@dataclass
class Skipped:
    """Counts skipped files by reason."""

    undecodable: int = 0
    unparsable: int = 0


def source_files(root: Path) -> list[Path]:
    """Return the usable Python sources under root, shuffled with the fixed seed."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        files = [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
        paths += [path for path in files if 0 < path.stat().st_size <= _LARGEST_FILE_BYTES]
    random.Random(_SEED).shuffle(paths)
    return paths


def read_source(path: Path, skipped: Skipped) -> str | None:
    """Return a file's text, or count it as skipped when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        skipped.undecodable += 1
        return None


def code_documents(root: Path, skipped: Skipped) -> Iterator[str]:
    """Yield the text of each source file under root."""
    for path in source_files(root):
        text = read_source(path, skipped)
        if text is not None:
            yield text


def topics(root: Path) -> list[str]:
    """Return the texts of `help()`'s topics, in the order of their names, without importing.

    Raises:
        DataError: The file is missing or does not assign a dictionary of strings to `topics`.
    """
    path = root / _TOPICS
    try:
        tree = ast.parse(path.read_bytes())
        values = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics"
        ]
        return [values[0][name] for name in sorted(values[0])]
    except (OSError, SyntaxError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} holds no dictionary `topics` ({error}); the docs come from there; use a Python"
            " with its full standard library"
        ) from error


def docstrings(source: str, *, module: str) -> str | None:
    """Return all docstrings of a module under their qualified names, in order.

    Args:
        source: The module's text.
        module: Its dotted name.

    Returns:
        Heading and text of each, blank lines between; None when the module has none.

    Raises:
        SyntaxError: The text is not Python.
    """
    found: list[str] = []

    def visit(
        node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
    ) -> None:
        text = ast.get_docstring(node)
        if text:
            found.append(f"{name}\n\n{text}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(ast.parse(source), module)
    return "\n".join(found) or None


def docs_documents(root: Path, skipped: Skipped) -> Iterator[str]:
    """Yield topics and modules' docstrings, mixed.

    Raises:
        DataError: As `topics`.
    """
    items: list[str | Path] = [*topics(root), *source_files(root)]
    random.Random(_SEED).shuffle(items)
    for item in items:
        if isinstance(item, str):
            yield item
            continue
        source = read_source(item, skipped)
        if source is None:
            continue
        try:
            text = docstrings(source, module=module_name(item.relative_to(root)))
        except (SyntaxError, ValueError):
            skipped.unparsable += 1
            continue
        if text is not None:
            yield text


def module_name(path: Path) -> str:
    """Return the dotted name of a source file, given relative to the library's root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def write_jsonl(path: Path, documents: Iterator[str], limit_bytes: float) -> tuple[int, int]:
    """Write documents up to a size of text; return how many, and their UTF-8 bytes.

    The file appears only when it is complete.
    """
    count = size = 0
    with atomic_write(path) as file:
        for text in documents:
            length = len(text.encode("utf-8"))
            if size + length > limit_bytes:
                break
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8"))
            count, size = count + 1, size + length
    return count, size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("build_corpus", command="build-corpus"),
        description="Write code.jsonl and docs.jsonl from the running Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", help="gets code.jsonl and docs.jsonl"
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=float("inf"),
        metavar="N",
        help="stop each file before it holds more text than this",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    args = parse_args(argv)
    root = Path(sysconfig.get_path("stdlib"))
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, collect in (("code", code_documents), ("docs", docs_documents)):
            skipped = Skipped()
            path = folder / f"{name}.jsonl"
            count, size = write_jsonl(path, collect(root, skipped), args.max_megabytes * 1e6)
            print(
                f"{path}: {count:,} documents, {size:,} bytes of text; skipped"
                f" {skipped.undecodable} files that are not UTF-8 and {skipped.unparsable} that"
                " are not Python"
            )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
