"""Write code.jsonl, docs.jsonl and manuals.jsonl from what is installed on this machine.

python examples/ablations/texts.py OUTPUT [--manuals DIR ...] [--max-megabytes N]

code: sources of the standard library and of every installed package. docs: their docstrings, and
their text files. manuals: HTML and text of /usr/share/doc, and of the folders named. The same files
give the same corpus; copies are left to deduplication.
"""

import argparse
import html.parser
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_app.data.build_corpus import (
    Skipped,
    docstrings,
    module_name,
    read_source,
    source_files,
    topics,
    write_jsonl,
)

TEXTS = {".md", ".rst", ".txt"}
PAGES = {".htm", ".html"}
LARGEST_FILE_BYTES = 500_000
SEED = 20240903


class PageText(html.parser.HTMLParser):
    """Collects what a reader sees of a page, a block a line."""

    hidden = frozenset({"script", "style", "head", "nav"})
    blocks = frozenset({"p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Starts a line or a part that nobody sees."""
        self.depth += tag in self.hidden
        if tag in self.blocks:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Ends a part that nobody sees."""
        if tag in self.hidden and self.depth:
            self.depth -= 1

    def handle_data(self, data: str) -> None:
        """Keeps a text."""
        if not self.depth:
            self.parts.append(data)


def page_text(page: str) -> str:
    """Return a page's text without markup, blank lines and spaces at the ends of lines."""
    parser = PageText()
    parser.feed(page)
    parser.close()
    lines = (line.strip() for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


def library_roots() -> list[Path]:
    """Return where this Python keeps its standard library and its packages."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def code() -> Iterator[str]:
    """Yield sources, the standard library first."""
    skipped = Skipped()
    for root in library_roots():
        for path in source_files(root):
            text = read_source(path, skipped)
            if text is not None:
                yield text


def files_below(roots: list[Path], suffixes: set[str]) -> list[Path]:
    """Return the files of these endings, shuffled with the fixed seed."""
    found = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in suffixes]
    usable = [path for path in found if path.is_file() and not path.is_symlink()]
    usable = [path for path in usable if 0 < path.stat().st_size <= LARGEST_FILE_BYTES]
    random.Random(SEED).shuffle(usable)
    return usable


def docs() -> Iterator[str]:
    """Yield the language reference, docstrings by module and packages' text files, mixed."""
    stdlib, purelib = library_roots()
    items: list[tuple[Path, Path] | str] = [*topics(stdlib)]
    items += [(root, path) for root in (stdlib, purelib) for path in source_files(root)]
    items += [(purelib, path) for path in files_below([purelib], TEXTS)]
    random.Random(SEED).shuffle(items)
    for item in items:
        text = item if isinstance(item, str) else document(*item)
        if text is not None:
            yield text


def document(root: Path, path: Path) -> str | None:
    """Return a text file's text, a source's docstrings; None where there is nothing to read."""
    text = read_source(path, Skipped())
    if text is None or path.suffix in TEXTS:
        return text
    try:
        return docstrings(text, module=module_name(path.relative_to(root)))
    except (SyntaxError, ValueError):
        return None


def manuals(folders: list[Path]) -> Iterator[str]:
    """Yield pages and texts of the distribution's documentation, mixed."""
    roots = [Path("/usr/share/doc"), *folders]
    for path in files_below([root for root in roots if root.is_dir()], TEXTS | PAGES):
        text = path.read_bytes().decode("utf-8", "replace")
        yield page_text(text) if path.suffix in PAGES else text


def main() -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--manuals", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--max-megabytes", type=float, default=float("inf"), metavar="N")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    collections = {"code": code(), "docs": docs(), "manuals": manuals(args.manuals)}
    for name, documents in collections.items():
        path = args.output / f"{name}.jsonl"
        count, size = write_jsonl(path, documents, args.max_megabytes * 1e6)
        print(f"{path}: {count:,} documents, {size:,} bytes of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
