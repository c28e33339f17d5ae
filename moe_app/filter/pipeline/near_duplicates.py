"""Finds documents like one before: datatrove's MinHash signatures and buckets, our clusters.

datatrove's own clusters keep any document of one, by the order in which they were joined, and hold
a Python dictionary of them; ours keep the first, and hold arrays.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer
from fsspec.implementations.local import LocalFileSystem

from moe_app.filter.filter_specs import MinhashRule
from moe_app.filter.first_occurrences import REMOVAL, cluster_firsts
from moe_app.filter.pipeline.ledger import Ledger
from moe_app.filter.pipeline.reading import Documents, ledger_of
from moe_app.filter.pipeline.removals import load_array, removal_path, save_array

_PAIRS_AT_ONCE = 1 << 20


class WordSplitter(WordTokenizer):
    """Splits text at white space, which datatrove has put in place of punctuation."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return a text's words."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Return a text's lines, which stand for sentences."""
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the text as one span."""
        return [(0, len(text))]


def local_folder(path: Path) -> DataFolder:
    """Return a folder of this file system; no part of its name is read as an address."""
    return DataFolder(str(path), fs=LocalFileSystem())


def minhash_config(rule: MinhashRule) -> MinhashConfig:
    """Return datatrove's form of the settings."""
    return MinhashConfig(
        n_grams=rule.ngram,
        num_buckets=rule.buckets,
        hashes_per_bucket=rule.hashes,
        seed=rule.seed,
    )


class SignatureWriter(MinhashDedupSignature):
    """Writes the signatures of a file's documents; the last step of a reading."""

    type = "DEDUP"
    name = "signatures"

    def __init__(self, ledger: Ledger, folder: Path, lines: Path, rule: MinhashRule) -> None:
        super().__init__(local_folder(folder), config=minhash_config(rule), language=WordSplitter())
        self.ledger = ledger
        self.lines = lines

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> None:
        """Write one file's signatures, and which line each of its documents is."""
        lines: list[int] = []

        def noted() -> Iterator[Document]:
            for document in data or ():
                lines.append(document.metadata["entry"].line)
                yield document

        with ledger_of(self.ledger, rank):
            super().run(noted(), rank, world_size)
            save_array(self.lines / f"{rank:05d}.npy", np.array(lines, np.uint64))


def pair_finder(signatures: Path, pairs: Path, rule: MinhashRule) -> MinhashDedupBuckets:
    """Return datatrove's step that finds equal buckets; a task for each of `rule.buckets`."""
    return MinhashDedupBuckets(
        local_folder(signatures), local_folder(pairs), config=minhash_config(rule)
    )


class ClusterFinder(PipelineStep):
    """Joins pairs to clusters, and removes all but the first of each; one task."""

    type = "DEDUP"
    name = "clusters"

    def __init__(self, pairs: Path, lines: Path, removals: Path, *, files: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.lines = lines
        self.removals = removals
        self.files = files

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write what is removed from each file."""
        lines = [
            load_array(self.lines / f"{file:05d}.npy", mapped=True) for file in range(self.files)
        ]
        starts = np.cumsum([0, *map(len, lines)])
        firsts = cluster_firsts(_read_pairs(self.pairs, starts), int(starts[-1]))
        for file, (start, stop) in enumerate(pairwise(starts.tolist())):
            own = firsts[start:stop]
            later = np.flatnonzero(own != np.arange(start, stop, dtype=own.dtype))
            places = own[later].astype(np.int64)
            removals = np.zeros(len(later), REMOVAL)
            removals["line"] = lines[file][later]
            removals["first_file"] = files = np.searchsorted(starts, places, side="right") - 1
            removals["first_line"] = [
                lines[each][place]
                for each, place in zip(
                    files.tolist(), (places - starts[files]).tolist(), strict=True
                )
            ]
            save_array(removal_path(self.removals, 0, file), removals)


def _read_pairs(
    folder: Path, starts: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """Yield [n, 2] documents of all buckets, numbered over all files."""
    for path in sorted(folder.glob("*.dups")):
        with path.open("rb") as file:
            while len(rows := np.fromfile(file, "<u4", count=4 * _PAIRS_AT_ONCE)):
                pairs = rows.reshape(-1, 2, 2).astype(np.int64)
                yield (starts[pairs[..., 0]] + pairs[..., 1]).astype(np.uint64)
