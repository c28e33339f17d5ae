"""Write the texts of a source that holds parts of a larger one, or questions and answers.

    python examples/jetmoe_data/to_text.py pile-arxiv data/jetmoe

Reads DATA/hub/OWNER/NAME and writes DATA/raw/SOURCE/, JSON Lines with the key `text`, a file for
each file read; a file that is there is not made again. Parts of a text are parted by a blank line:
JetMoE's paper does not say how it wrote instructions as text.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.errors import DataError, UserError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.data.sources import find_sources
from moe_app.filter.records import json_line, read_rows

Row = Mapping[str, Any]
Text = Callable[[Row], str | None]
"""Returns a row's text; None for a row that is not of the source."""


def fields(*names: str) -> Text:
    """Join fields of a row."""

    def text(row: Row) -> str:
        return "\n\n".join(row[name] for name in names if row[name])

    return text


def turns(key: str, content: str) -> Text:
    """Join the turns of a conversation."""

    def text(row: Row) -> str:
        return "\n\n".join(turn[content] for turn in row[key])

    return text


def pile(*parts: str, all_but: bool = False) -> Text:
    """Take rows of some parts of The Pile."""

    def text(row: Row) -> str | None:
        is_named = row["meta"]["pile_set_name"] in parts
        return row["text"] if is_named != all_but else None

    return text


_PILE = "monology/pile-uncopyrighted"
_NAMED = ("Wikipedia (en)", "StackExchange", "ArXiv")
SOURCES: dict[str, dict[str, Text]] = {
    "pile-wikipedia": {_PILE: pile("Wikipedia (en)")},
    "pile-stackexchange": {_PILE: pile("StackExchange")},
    "pile-arxiv": {_PILE: pile("ArXiv")},
    "pile-remaining": {_PILE: pile(*_NAMED, all_but=True)},
    "template-gsm": {"math-ai/TemplateGSM": fields("problem", "solution_wocode", "solution_code")},
    "stack-math-qa": {"math-ai/StackMathQA": fields("Q", "A")},
    "language-sft": {
        "CohereForAI/xP3x": fields("inputs", "targets"),
        "OpenAssistant/oasst1": fields("text"),
        "teknium/OpenHermes-2.5": turns("conversations", "value"),
        "HuggingFaceH4/ultrachat_200k": turns("messages", "content"),
        "bigcode/oasst-octopack": turns("conversations", "text"),
    },
    "code-sft": {
        "ise-uiuc/Magicoder-OSS-Instruct-75K": fields("problem", "solution"),
        "ise-uiuc/Magicoder-Evol-Instruct-110K": fields("instruction", "response"),
        "ajibawa-2023/Code-290k-ShareGPT": turns("conversations", "value"),
        "bigcode/commitpackft": fields("old_contents", "message", "new_contents"),
        "theblackcat102/evol-codealpaca-v1": fields("instruction", "output"),
    },
}
"""The columns of each data set; a row of another form stops with its place."""


def convert(name: str, data: Path) -> None:
    """Write the texts of one source.

    Raises:
        DataError: A row has another form.
        OSError: A file cannot be read or written.
    """
    folder = data / "raw" / name
    folder.mkdir(parents=True, exist_ok=True)
    for hub_id, text in SOURCES[name].items():
        root = (data / "hub" / hub_id).absolute()
        for source in find_sources([str(root)]):
            # By its own name, which files that are fetched later do not change.
            name_there = Path(source.path).relative_to(root).as_posix().replace("/", "-")
            path = folder / f"{hub_id.replace('/', '-')}-{name_there}.jsonl"
            if path.exists():
                continue
            with atomic_write(path) as file:
                for line, _, row in read_rows(source):
                    if isinstance(row, str):
                        raise DataError(row)
                    try:
                        found = text(row)
                    except (KeyError, TypeError) as error:
                        raise DataError(
                            f"{source.path}, line {line}: {type(error).__name__} {error}; the card"
                            f" of {hub_id} says what its rows hold; adapt SOURCES in this script"
                        ) from error
                    if found is not None:
                        file.write(json_line({"text": found}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return 0, or 2 after printing what is wrong."""
    parser = argparse.ArgumentParser(prog="to_text.py", description=__doc__)
    parser.add_argument("source", choices=list(SOURCES))
    parser.add_argument("data", type=Path, help="holds hub/ and gets raw/")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.data)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
