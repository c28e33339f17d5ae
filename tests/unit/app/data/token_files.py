"""Provides what tests of preprocessing share."""

from pathlib import Path

WORDS = ["the", "quick", "fox", "caf\u00e9", "\u65e5\u672c", "a </s> b", ""]
TEXTS = [" ".join(WORDS[(n * k) % 7] for k in range(n % 11)) for n in range(400)]
SUFFIXES = (".bin", ".idx", ".json")


GOOD = b'{"text": "the fox"}'


def files(output: Path) -> list[bytes]:
    return [Path(f"{output}_text_document{suffix}").read_bytes() for suffix in SUFFIXES]
