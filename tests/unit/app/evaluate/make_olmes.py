"""Makes requests in the form of those that were published for OLMES."""

import gzip
import json
from pathlib import Path
from typing import Any

from moe_app.evaluate.olmes import OLMES_TASKS

OLMES_ITEMS = {
    # Task: cloze normalisation of the paper's Table 11, questions with answers.
    "arc_challenge": ("pmi", [("the quick", [" fox", " lazy dog"], 1), ("over", [" the", "."], 0)]),
    "hellaswag": (
        "char",
        [("the lazy", [" dog jumps over", " fox"], 0), ("fox", [" a", " bc"], 1)],
    ),
    "boolq": ("none", [("dog", [" yes", " no"], 0), ("the lazy dog", [" yes", " no"], 1)]),
}


def write_olmes(root: Path) -> dict[str, list[Any]]:
    """Write requests in the published form; return those of each file."""
    made: dict[str, list[Any]] = {}
    for name, (_, items) in OLMES_ITEMS.items():
        for form in ("rc", "mc"):
            records = []
            for doc, (question, choices, gold) in enumerate(items):
                for index, choice in enumerate(choices):
                    text = choice if form == "rc" else f" {'AB'[index]}"
                    context = f"Question: {question}\nAnswer:"
                    for shift, asked in ((0, context), (1_000_000, "Answer:")):
                        request = {"context": asked, "continuation": text}
                        record = {"doc_id": doc + shift, "idx": index, "label": gold}
                        records.append({**record, "request": request})
            split = OLMES_TASKS[name].split
            path = root / name / f"{split}_{form}_5shot" / "requests.jsonl.gz"
            path.parent.mkdir(parents=True)
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
            made[f"{name}_{form}"] = records
    return made
