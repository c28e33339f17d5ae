"""Indexes evaluation texts, and drops documents that hold n-grams of one."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_text
from moe_app.data.sources import SourceFile
from moe_app.filter.filter_specs import DecontaminateRule
from moe_app.filter.overlap import OverlapIndex, WordHasher, build_index
from moe_app.filter.pipeline.document_filters import RuleFilter
from moe_app.filter.pipeline.ledger import Ledger
from moe_app.filter.pipeline.reading import Documents
from moe_app.filter.pipeline.removals import load_array, save_array
from moe_app.filter.records import BadEntry, read_entries
from moe_app.filter.rules import Verdict

_COLUMNS = ("lengths", "starts", "hashes", "items")
_ITEMS = "items.json"


class OverlapIndexer(PipelineStep):
    """Writes the index of all evaluation texts; one task."""

    type = "DECONTAMINATION"
    name = "index"

    def __init__(
        self, sources: tuple[SourceFile, ...], folder: Path, rule: DecontaminateRule
    ) -> None:
        super().__init__()
        self.sources = sources
        self.folder = folder
        self.rule = rule

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the index.

        Raises:
            DataError: An evaluation item holds no text, or no item has words enough.
        """
        places: list[str] = []

        def texts() -> Iterator[str]:
            for source in self.sources:
                for entry in read_entries(source, text_key=self.rule.key):
                    if isinstance(entry, BadEntry):
                        raise DataError(
                            f"decontaminate: {entry.problem}; the key is set with"
                            " decontaminate:key=..."
                        )
                    places.append(f"{source.path}:{entry.line}")
                    yield entry.text

        index, too_short = build_index(texts(), self.rule)
        if len(index.hashes) == 0:
            raise DataError(
                f"decontaminate: none of {len(places)} evaluation texts in {self.rule.against} has"
                f" {self.rule.min_words} words; there must be one; lower min_words"
            )
        for name in _COLUMNS:
            save_array(self.folder / f"{name}.npy", getattr(index, name))
        value = {"places": places, "too_short": too_short}
        write_text(self.folder / _ITEMS, json.dumps(value))


def count_evaluation_texts(folder: Path) -> dict[str, int]:
    """Return how many evaluation texts there are, and how many are too short to look for."""
    value = json.loads((folder / _ITEMS).read_bytes())
    return {
        "evaluation texts": len(value["places"]),
        "evaluation texts too short to look for": len(value["too_short"]),
    }


@functools.lru_cache(maxsize=4)
def _load_index(folder: Path) -> tuple[OverlapIndex, list[str], WordHasher]:
    columns = {name: load_array(folder / f"{name}.npy", mapped=True) for name in _COLUMNS}
    places = json.loads((folder / _ITEMS).read_bytes())["places"]
    return OverlapIndex(**columns), places, WordHasher()


class ContaminationFilter(RuleFilter):
    """Drops documents that overlap an evaluation text, and says which."""

    def __init__(self, ledger: Ledger, position: int, folder: Path) -> None:
        super().__init__(ledger, position)
        self.folder = folder

    def judge(self, document: Document) -> Verdict | None:
        """Return the evaluation texts that a document overlaps."""
        index, places, hasher = _load_index(self.folder)
        found = index.match(hasher.hash(document.text))
        if not found:
            return None
        items = [
            {"item": places[item], "word": word, "words": words} for item, word, words in found
        ]
        return Verdict("overlap", {"items": items, "num_items": len(found)})
