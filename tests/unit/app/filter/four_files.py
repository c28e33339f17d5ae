"""Makes the corpus by which work on clusters is compared, and reads what came of it."""

import json
from pathlib import Path

TEXTS = ("one two three four five six seven", "eight nine ten eleven twelve", "a b c d e f")


def write_four_files(folder: Path) -> None:
    """Write four files, each of which repeats a text of the first."""
    folder.mkdir()
    for number in range(4):
        texts = [*TEXTS[: 1 + number % 3], f"only {number} has this one"]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{number}.jsonl").write_text("".join(lines))


def finished_corpus(output: Path) -> dict[str, bytes]:
    """Return what a finished corpus holds."""
    paths = [path for name in ("kept", "dropped") for path in (output / name).iterdir()]
    found = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}
    return found | {"summary": (output / "summary.json").read_bytes()}
