"""Lay out the text of this machine as the sources of OLMoE-Mix are laid out when they are fetched.

    python examples/data_demo/toy_sources.py FILTERED DATA

FILTERED is what filter_data.py kept and dropped of code.jsonl, docs.jsonl and manuals.jsonl. Writes
DATA/raw/NAME/; planted documents in each show what the recipe drops.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

PROSE = {"dclm": 14, "pes2o": 2, "arxiv": 2, "open-web-math": 1, "algebraic-stack": 1, "wiki": 1}
"""Parts of the prose that a source gets."""


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file."""
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write JSON Lines, unless they are there: a file that is written again counts as changed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> int:
    """Write all sources."""
    kept, raw = Path(sys.argv[1], "kept"), Path(sys.argv[2], "raw")
    code: list[dict[str, object]] = [
        {"content": text, "max_stars_count": 2 + number % 9}
        for number, text in enumerate(texts(kept / "code.jsonl"))
    ]
    code += [{"content": "import this", "max_stars_count": 1}, {"content": "x = 1\n" * 99}]
    write(raw / "starcoder/part.jsonl", code)
    prose = [*texts(kept / "manuals.jsonl"), *texts(kept / "docs.jsonl")]
    order = [name for name, parts in PROSE.items() for _ in range(parts)]
    for name in PROSE:
        rows: list[dict[str, object]] = [
            {"text": text}
            for number, text in enumerate(prose)
            if order[number % len(order)] == name
        ]
        write(raw / name / "part.jsonl", [*rows, {"text": "ha! " * 40}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
