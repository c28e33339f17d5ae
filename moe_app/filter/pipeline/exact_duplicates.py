"""Finds equal documents or paragraphs over all files, in partitions of their hashes."""

from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep

from moe_app.filter.first_occurrences import (
    KEY,
    keys_of_partition,
    later_occurrences,
    sort_keys,
    split_paragraphs,
    text_key,
)
from moe_app.filter.pipeline.ledger import Ledger
from moe_app.filter.pipeline.reading import Documents, ledger_of
from moe_app.filter.pipeline.removals import load_array, removal_path, save_array


class KeyWriter(PipelineStep):
    """Writes the sorted hashes of a file's documents or paragraphs; the last step of a reading."""

    type = "DEDUP"
    name = "hashes"

    def __init__(self, ledger: Ledger, folder: Path, *, by: str) -> None:
        super().__init__()
        self.ledger = ledger
        self.folder = folder
        self.by = by

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> None:
        """Write the hashes of one file."""
        found: list[tuple[int, int, int, int]] = []
        with ledger_of(self.ledger, rank):
            for document in data or ():
                line = document.metadata["entry"].line
                if self.by == "document":
                    found.append((*text_key(document.text), line, 0))
                    continue
                for part, text in enumerate(split_paragraphs(document.text)[::2]):
                    if text.strip():
                        found.append((*text_key(text.strip()), line, part))
            save_array(self.folder / f"{rank:05d}.npy", sort_keys(np.array(found, KEY)))


class DuplicateFinder(PipelineStep):
    """Finds what occurs before, among the hashes of one partition of all files."""

    type = "DEDUP"
    name = "first occurrences"

    def __init__(self, keys: Path, removals: Path, *, files: int) -> None:
        super().__init__()
        self.keys = keys
        self.removals = removals
        self.files = files

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the removals of one partition."""
        paths = [self.keys / f"{file:05d}.npy" for file in range(self.files)]
        mapped = [load_array(path, mapped=True) for path in paths]
        found = later_occurrences([keys_of_partition(each, rank, world_size) for each in mapped])
        for file, removals in enumerate(found):
            save_array(removal_path(self.removals, rank, file), removals)
