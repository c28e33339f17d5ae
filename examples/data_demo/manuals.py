"""Write manuals.jsonl from installed packages, and an evaluation text that the corpus holds.

python examples/data_demo/manuals.py CORPUS
"""

import json
import sys
import sysconfig
from pathlib import Path

MOST_FILES = 400
SUFFIXES = {".md", ".rst", ".txt"}


def main() -> int:
    """Write both files; copies among the manuals stay, so that deduplication finds some."""
    corpus = Path(sys.argv[1])
    roots = [Path("/usr/share/doc"), Path(sysconfig.get_path("purelib"))]
    paths = [path for root in roots if root.is_dir() for path in root.rglob("*")]
    wanted = [path for path in paths if path.name == "copyright" or path.suffix in SUFFIXES]
    found: list[dict[str, str]] = []
    for path in sorted(wanted):
        if path.is_file() and 0 < path.stat().st_size < 60_000 and len(found) < MOST_FILES:
            found.append({"text": path.read_bytes().decode("utf-8", "replace"), "path": str(path)})
    lines = "".join(json.dumps(each) + "\n" for each in found)
    (corpus / "manuals.jsonl").write_text(lines, "utf-8")
    # Planted: the first words of a document stand for an evaluation text that leaked.
    with (corpus / "docs.jsonl").open("rb") as documents:
        leaked = " ".join(json.loads(next(documents))["text"].split()[:40])
    (corpus / "evaluation").mkdir(exist_ok=True)
    question = json.dumps({"text": leaked}) + "\n"
    (corpus / "evaluation/questions.jsonl").write_text(question, "utf-8")
    print(f"{corpus}/manuals.jsonl: {len(found):,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
