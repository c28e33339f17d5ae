"""Check what compares documents, in plain Python: first occurrences, clusters, overlaps."""

import random
import re

import numpy as np
import pytest

from moe_app.filter.first_occurrences import (
    KEY,
    cluster_firsts,
    keys_of_partition,
    later_occurrences,
    remove_paragraphs,
    sort_keys,
    split_paragraphs,
    text_key,
)
from moe_app.filter.overlap import OverlapRule, WordHasher, build_index


def test_later_occurrences_are_those_of_a_set_whatever_the_partitions() -> None:
    draw = random.Random(2)
    for _ in range(30):
        files = [[draw.choice("abcdefgh") for _ in range(draw.randint(0, 9))] for _ in range(4)]
        seen: dict[str, tuple[int, int]] = {}
        wanted: list[tuple[int, int, int, int]] = []
        for file, texts in enumerate(files):
            for line, text in enumerate(texts, start=1):
                if text in seen:
                    wanted.append((file, line, *seen[text]))
                seen.setdefault(text, (file, line))
        keys = [
            sort_keys(
                np.array([(*text_key(text), line, 0) for line, text in enumerate(texts, 1)], KEY)
            )
            for texts in files
        ]
        for partitions in (1, 3):
            found = [
                (file, int(each["line"]), int(each["first_file"]), int(each["first_line"]))
                for partition in range(partitions)
                for file, removals in enumerate(
                    later_occurrences([keys_of_partition(k, partition, partitions) for k in keys])
                )
                for each in removals
            ]
            assert sorted(found) == wanted


def test_every_key_is_in_one_partition() -> None:
    keys = sort_keys(np.array([(high, 0, 1, 0) for high in (0, 1, 1 << 63, (1 << 64) - 1)], KEY))
    parts = [keys_of_partition(keys, each, 2) for each in range(2)]
    assert [len(each) for each in parts] == [2, 2]
    assert np.array_equal(np.concatenate(parts), keys)


def test_clusters_are_connected_components_and_keep_their_first() -> None:
    draw = random.Random(3)
    for _ in range(100):
        pairs = [(draw.randrange(30), draw.randrange(30)) for _ in range(draw.randint(0, 25))]
        component = {each: {each} for pair in pairs for each in pair}
        for a, b in pairs:
            joined = component[a] | component[b]
            component |= dict.fromkeys(joined, joined)
        edges = np.array(pairs, np.uint64).reshape(-1, 2)
        for parts in ([edges], np.array_split(edges, 3)):
            found = cluster_firsts(parts, 30).tolist()
            assert found == [min(component.get(each, [each])) for each in range(30)]


def test_long_chain_of_documents_is_one_cluster() -> None:
    order = np.random.default_rng(5).permutation(100_000).astype(np.uint64)
    for chain in (order, np.arange(100_000, dtype=np.uint64)):
        edges = np.stack([chain[:-1], chain[1:]], axis=1)
        assert not cluster_firsts(np.array_split(edges, 5), len(chain)).any()


@pytest.mark.parametrize("text", ["", "a", "a\n\nb", "\n\na\n \n\nb\nc\n\n", "a\r\n\r\nb"])
def test_paragraphs_and_their_breaks_make_up_the_text(text: str) -> None:
    assert "".join(split_paragraphs(text)) == text == remove_paragraphs(text, [])


def test_paragraphs_are_cut_out_with_the_blank_lines_after_them() -> None:
    text = "one\nstill one\n\ntwo\n\n \nthree\n"
    assert split_paragraphs(text)[::2] == ["one\nstill one", "two", "three\n"]
    assert remove_paragraphs(text, [1]) == "one\nstill one\n\nthree\n"
    assert remove_paragraphs(text, [0, 2]) == "two\n\n \n"


def plain_overlaps(text: str, items: list[str], rule: OverlapRule) -> set[int]:
    """Compare all slices of words."""
    words = re.findall(r"\w+", text.casefold())
    found = set()
    for number, item in enumerate(items):
        known = re.findall(r"\w+", item.casefold())
        size = min(rule.ngram, len(known))
        grams = [known[start : start + size] for start in range(len(known) - size + 1)]
        slices = [words[start : start + size] for start in range(len(words) - size + 1)]
        if len(known) >= rule.min_words and any(gram in slices for gram in grams):
            found.add(number)
    return found


def test_overlaps_are_those_of_compared_slices() -> None:
    draw = random.Random(4)
    rule = OverlapRule(ngram=4, min_words=2)

    def text(most: int) -> str:
        words = (draw.choice(["Ab", "b", "c", "Dé"]) for _ in range(draw.randint(0, most)))
        return draw.choice([" ", ", ", "\n"]).join(words)

    hits = 0
    for _ in range(100):
        items = [text(6) for _ in range(5)]
        index, too_short = build_index(items, rule)
        assert too_short == [n for n, each in enumerate(items) if len(each.split()) < 2]
        for document in (text(12).upper() for _ in range(5)):
            found = index.match(WordHasher().hash(document))
            assert {item for item, *_ in found} == plain_overlaps(document, items, rule)
            hits += bool(found)
    assert 50 < hits < 450


def test_overlap_names_place_and_item() -> None:
    items = ["never seen words", "What is the capital of France? It is Paris, of course, my dear."]
    index, too_short = build_index(items, OverlapRule())
    assert too_short == [0]
    text = "Quiz. WHAT is the\ncapital of France it is -- Paris of course my dear!"
    assert index.match(WordHasher().hash(text)) == [(1, 1, 13)]
    assert index.match(WordHasher().hash(text.replace("Paris", "Lyon"))) == []
