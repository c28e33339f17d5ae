"""Compare near-duplicates that the command finds among planted ones with datasketch's."""

import json
import math
import random
from pathlib import Path

import pytest

from moe_app.filter.filter_data import main
from moe_app.filter.filter_specs import MinhashRule
from tests.paths import REPO

RULE = MinhashRule()
SHARES = (0.0, 0.01, 0.03, 0.05, 0.3)
"""Shares of words that are replaced in the planted copies, in turn."""


@pytest.fixture(scope="module")
def originals() -> list[str]:
    """Return texts of at least 200 words of which no two are alike."""
    paths = sorted((REPO / "megatron/trainer").rglob("*.py"))
    texts = [path.read_text("utf-8") for path in paths]
    return [text for text in texts if len(text.split()) >= 200][:80]


def with_other_words(text: str, share: float, draw: random.Random) -> str:
    words = text.split()
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = "".join(draw.choices("bcdfgh", k=9))
    return " ".join(words)


def shingles(text: str) -> set[str]:
    """Return the n-grams of a text's words as plain Python finds them."""
    words = "".join(each if each.isalnum() else " " for each in text.lower()).split()
    return {" ".join(words[at : at + RULE.ngram]) for at in range(len(words) - RULE.ngram + 1)}


def alike(text: str, other: str) -> float:
    """Return the share of n-grams that two texts have in common."""
    one, two = shingles(text), shingles(other)
    return len(one & two) / len(one | two)


def found_by_datasketch(texts: list[str]) -> dict[int, int]:
    """Return the texts that have one like them before, and which."""
    from datasketch import MinHash, MinHashLSH

    permutations = RULE.buckets * RULE.hashes
    index = MinHashLSH(num_perm=permutations, params=(RULE.buckets, RULE.hashes))
    found = {}
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=permutations)
        sketch.update_batch([each.encode() for each in shingles(text)])
        if before := index.query(sketch):
            found[number] = min(before)
        index.insert(number, sketch)
    return found


def found_by_command(texts: list[str], folder: Path) -> dict[int, int]:
    """Return the texts that the command drops, and for which."""
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t, "n": n}) + "\n" for n, t in enumerate(texts)))
    command = ["--input", str(path), "--output", str(folder / "out"), "--filter", "minhash"]
    assert main(command) == 0
    dropped = map(json.loads, (folder / "out/dropped/in.jsonl").read_text().splitlines())
    return {each["n"]: int(each["detail"]["first"].rpartition(":")[2]) - 1 for each in dropped}


def test_planted_near_duplicates_are_found_as_often_as_by_datasketch(
    tmp_path: Path, originals: list[str]
) -> None:
    draw = random.Random(8)
    shares = [SHARES[number % len(SHARES)] for number in range(len(originals))]
    copies = [
        with_other_words(text, share, draw) for text, share in zip(originals, shares, strict=True)
    ]
    chances = [
        1 - (1 - alike(text, copy) ** RULE.hashes) ** RULE.buckets
        for text, copy in zip(originals, copies, strict=True)
    ]
    expected = sum(chances)
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances))
    planted = {len(originals) + number: number for number in range(len(originals))}
    texts = originals + copies
    for found in (found_by_command(texts, tmp_path), found_by_datasketch(texts)):
        # Precision: nothing else is found, and each with its original.
        assert found.items() <= planted.items()
        exact = [
            number for number in planted if texts[number].split() == texts[planted[number]].split()
        ]
        assert len(exact) >= len(originals) // len(SHARES) and set(exact) <= found.keys()
        # Recall: as often as the rule's formula says for the n-grams that they have in common.
        assert abs(len(found) - expected) < 4 * deviation
    assert 0.5 * len(originals) < expected < 0.8 * len(originals)
