"""Drops or edits what a stage over all files found to be there before."""

from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from moe_app.filter.first_occurrences import REMOVAL, Removals, remove_paragraphs
from moe_app.filter.pipeline.document_filters import RuleFilter
from moe_app.filter.pipeline.ledger import Ledger
from moe_app.filter.rules import Verdict


def save_array(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Write an array for a later stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def load_array(path: Path, *, mapped: bool = False) -> np.ndarray[Any, Any]:
    """Read an array of an earlier stage."""
    values: np.ndarray[Any, Any] = np.load(
        path, mmap_mode="r" if mapped else None, allow_pickle=False
    )
    return values


def removal_path(folder: Path, partition: int, file: int) -> Path:
    """Return where a partition's task says what is removed from a file."""
    return folder / f"{partition:05d}" / f"{file:05d}.npy"


class RemovalFilter(RuleFilter):
    """Drops the documents of a file that are removed, and says which one is kept for each."""

    def __init__(
        self, ledger: Ledger, position: int, folder: Path, *, partitions: int, reason: str
    ) -> None:
        super().__init__(ledger, position)
        self.folder = folder
        self.partitions = partitions
        self.reason = reason

    def prepare(self, rank: int) -> None:
        """Read the removals of this file."""
        self.removals: dict[int, list[tuple[int, str]]] = {}
        files = [removal_path(self.folder, each, rank) for each in range(self.partitions)]
        found: Removals = np.concatenate([np.empty(0, REMOVAL), *map(load_array, files)])
        for line, part, file, first in np.sort(found, order=["line", "part"]).tolist():
            where = f"{self.ledger.plan.sources[file].path}:{first}"
            self.removals.setdefault(line, []).append((part, where))

    def judge(self, document: Document) -> Verdict | None:
        """Return that a document was there before, and where."""
        found = self.removals.get(document.metadata["entry"].line)
        return None if found is None else Verdict(self.reason, {"first": found[0][1]})


class ParagraphFilter(RemovalFilter):
    """Cuts paragraphs out; drops documents that have none left."""

    def judge(self, document: Document) -> Verdict | None:
        """Change the document's text; return a verdict if nothing is left of it."""
        found = self.removals.get(document.metadata["entry"].line)
        if found is None:
            return None
        document.text = remove_paragraphs(document.text, [part for part, _ in found])
        if not document.text.strip():
            return Verdict(self.reason, {"first": found[0][1]})
        self.ledger.notes[f"{self.name}: documents with paragraphs cut out"] += 1
        self.ledger.notes[f"{self.name}: paragraphs cut out"] += len(found)
        return None
