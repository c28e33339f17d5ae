"""Measures the filters of documents on one core: the n-gram rule, overlaps, MinHash and clusters.

    python benchmarks/data_filters.py --token-file runs/quickstart/data/code_text_document \
        --text runs/quickstart/data/code.jsonl

The n-gram rule is timed on the documents of a token file, one by one as the filter calls it, on
the same tokens end to end, and on the worst that it can meet: two tokens at random, in which every
period has candidates. Near-duplicates are planted: copies of documents with a share of their words
replaced, searched for by the settings of --filter minhash, and by datasketch where it is installed.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.repetition import find_repetition
from moe_app.filter.filter_specs import MinhashRule
from moe_app.filter.first_occurrences import cluster_firsts
from moe_app.filter.overlap import OverlapRule, WordHasher, build_index

_REPLACED = (0.0, 0.01, 0.02, 0.05, 0.1)
"""Shares of words that are replaced in planted copies."""
_COPIES = 200
_MOST_TEXTS = 600


def best_seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the best time of several calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_repetition(prefix: str, rounds: int) -> dict[str, float]:
    """Return million tokens a second of the n-gram rule."""
    file = open_tokens(prefix)
    tokens = np.asarray(file.tokens)
    documents = [tokens[start:stop] for start, stop in pairwise(file.document_starts[:])]
    two = np.random.default_rng(1).integers(0, 2, 5_000_000).astype(np.uint16)
    chunks = np.split(tokens[: len(tokens) // 4096 * 4096], len(tokens) // 4096)
    kinds: dict[str, list[npt.NDArray[np.integer]]] = {
        "documents": documents,
        "sequences of 4,096": chunks,
        "end to end": [tokens],
        "two tokens at random": [two],
    }
    found = {}
    for name, texts in kinds.items():
        count = sum(map(len, texts))
        seconds = best_seconds(partial(_search, texts), rounds)
        found[f"{name} ({count:,} tokens in {len(texts):,})"] = count / 1e6 / seconds
    return found


def _search(texts: Sequence[npt.NDArray[np.integer]]) -> None:
    for each in texts:
        find_repetition(each)


def measure_text(texts: Sequence[str], rounds: int) -> dict[str, float]:
    """Return megabytes a second of overlaps and of MinHash signatures."""
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    index, _ = build_index(texts[:50], OverlapRule())
    hasher = WordHasher()
    step = new_signatures()
    return {
        "overlaps, MB/s": size
        / best_seconds(lambda: [index.match(hasher.hash(text)) for text in texts[50:]], rounds),
        "signatures, MB/s": size
        / best_seconds(
            lambda: [step.get_signature(step.get_shingles(text)) for text in texts], rounds
        ),
    }


def new_signatures() -> Any:
    """Return datatrove's step with the settings of --filter minhash."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    from moe_app.filter.pipeline.near_duplicates import WordSplitter, minhash_config

    config = minhash_config(MinhashRule())
    return MinhashDedupSignature("/tmp", config=config, language=WordSplitter())


def replaced(text: str, share: float, draw: np.random.Generator) -> str:
    """Return a text in which a share of the words is another word."""
    words = text.split(" ")
    for place in draw.choice(len(words), int(len(words) * share), replace=False):
        words[place] = f"w{draw.integers(1 << 30)}"
    return " ".join(words)


def measure_recall(texts: Sequence[str]) -> list[tuple[str, float, dict[str, float]]]:
    """Return found shares of planted copies, and wrong pairs, of ours and of datasketch."""
    draw = np.random.default_rng(7)
    long = [text for text in texts if len(text.split()) > 100][:_COPIES]
    finders = {"ours": find_ours, "datasketch": find_datasketch}
    rows = []
    for share in _REPLACED:
        copies = [replaced(text, share, draw) for text in long]
        for name, find in finders.items():
            try:
                pairs = find([*long, *copies])
            except ModuleNotFoundError:
                continue
            planted = {(each, each + len(long)) for each in range(len(long))}
            wrong = len(pairs - planted)
            found = len(pairs & planted)
            values = {"recall": found / len(planted), "other pairs": float(wrong)}
            rows.append((name, share, values))
    return rows


def find_ours(texts: Sequence[str]) -> set[tuple[int, int]]:
    """Return pairs that share a bucket."""
    step = new_signatures()
    seen: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(texts):
        for bucket, hashes in enumerate(step.get_signature(step.get_shingles(text))):
            seen.setdefault((bucket, *hashes), []).append(number)
    return {(a, b) for group in seen.values() for a in group for b in group if a < b}


def find_datasketch(texts: Sequence[str]) -> set[tuple[int, int]]:
    """Return pairs that datasketch finds with as many hashes, of the same n-grams."""
    from datasketch import MinHash, MinHashLSH

    rule = MinhashRule()
    step = new_signatures()
    lsh = MinHashLSH(num_perm=rule.buckets * rule.hashes, params=(rule.buckets, rule.hashes))
    hashes = []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=rule.buckets * rule.hashes)
        sketch.update_batch(
            [int(each).to_bytes(8, "little") for each in step.get_shingles(text).ravel()]
        )
        hashes.append(sketch)
        lsh.insert(number, sketch)
    return {(a, int(b)) for a, sketch in enumerate(hashes) for b in lsh.query(sketch) if a < int(b)}


def measure_clusters(count: int) -> dict[str, float]:
    """Return time and memory of joining the pairs of all buckets: half of all are copies."""
    draw = np.random.default_rng(3)
    buckets, size = MinhashRule().buckets, 1 << 20
    parts = buckets * count // 4 // size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    cluster_firsts(
        (draw.integers(0, count, (size, 2)).astype(np.uint64) for _ in range(parts)), count
    )
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "documents": count,
        "pairs of all buckets": parts * size,
        "seconds": seconds,
        "peak MB": grown * 1024 / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="data_filters.py", description=__doc__)
    parser.add_argument("--token-file", required=True, metavar="PREFIX")
    parser.add_argument("--text", required=True, metavar="FILE", help="JSON Lines")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--documents", type=int, default=20_000_000, metavar="N", help="(%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    texts = [json.loads(line)["text"] for line in Path(args.text).open("rb")][:_MOST_TEXTS]
    figures = {
        "n-gram rule, million tokens/s": measure_repetition(args.token_file, args.rounds),
        "text": measure_text(texts, args.rounds),
        "clusters": measure_clusters(args.documents),
    }
    for title, values in figures.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:48} {value:12,.2f}")
    recall = measure_recall(texts)
    print("planted copies: words replaced, found, other pairs")
    for name, share, values in recall:
        print(f"  {name:12} {share:6.0%} {values['recall']:8.1%} {values['other pairs']:6.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps({**figures, "recall": recall}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
