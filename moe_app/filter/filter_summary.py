"""Adds up the counts of all files and shows them: as JSON and as a table."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.trainer.errors import printable
from moe_app.filter.filter_plan import FilterPlan
from moe_app.filter.filter_specs import DecontaminateRule

_SAMPLE_SIZE = 5
_BAD_LISTED = 100
_MET_LISTED = 100

Counts = Mapping[str, Any]
"""What the last reading counted in one file."""


def summarize(plan: FilterPlan, files: Sequence[Counts]) -> dict[str, Any]:
    """Return the content of summary.json: the same for the same files, however they were run.

    Args:
        plan: What was filtered.
        files: The counts of its sources, in order.
    """
    documents = sum(each["documents"] for each in files)
    kept = sum(each["kept"] for each in files)
    notes: Counter[str] = Counter()
    for each in files:
        notes.update(each["notes"])
    bad = [
        {"file": source.path, "line": line, "problem": problem}
        for source, each in zip(plan.sources, files, strict=True)
        for line, problem in each["bad"]
    ]
    return {
        "documents": documents,
        "kept": kept,
        "dropped": documents - kept,
        "bad_lines": sum(each["num_bad"] for each in files),
        "filters": _filter_counts(plan, files, documents),
        "notes": dict(sorted(notes.items())),
        "bad_line_places": bad[:_BAD_LISTED],
        "files": [
            {
                "file": source.path,
                "output": f"{source.name}.jsonl",
                "documents": each["documents"],
                "kept": each["kept"],
                "dropped": each["documents"] - each["kept"],
                "bad_lines": each["num_bad"],
            }
            for source, each in zip(plan.sources, files, strict=True)
        ],
    }


def _filter_counts(
    plan: FilterPlan, files: Sequence[Counts], documents: int
) -> list[dict[str, Any]]:
    found = []
    for position, spec in enumerate(plan.filters):
        reasons: Counter[str] = Counter()
        sample: list[dict[str, Any]] = []
        for each in files:
            reasons.update(each["dropped"].get(str(position), {}))
            sample += each["samples"].get(str(position), [])
        dropped = sum(reasons.values())
        found.append(
            {
                "name": spec.name,
                "options": spec.as_json()[spec.name],
                "documents": documents,
                "kept": documents - dropped,
                "dropped": dropped,
                "reasons": dict(sorted(reasons.items())),
                "sample": sample[:_SAMPLE_SIZE],
            }
        )
        if isinstance(spec.options, DecontaminateRule):
            found[-1] |= _texts_met(each["met"].get(str(position), {}) for each in files)
        documents -= dropped
    return found


def _texts_met(files: Iterable[Mapping[str, int]]) -> dict[str, Any]:
    """Return how many evaluation texts documents hold, and in how many documents each is."""
    met: Counter[str] = Counter()
    for each in files:
        met.update(each)
    most = sorted(met.items(), key=lambda pair: (-pair[1], pair[0]))[:_MET_LISTED]
    listed = [{"item": item, "documents": count} for item, count in most]
    return {"evaluation_texts_met": len(met), "most_met": listed}


def summary_table(summary: Mapping[str, Any]) -> str:
    """Return the counts as text for a terminal."""
    rows: list[tuple[str, ...]] = [("filter", "documents", "kept", "dropped", "reasons")]
    for each in summary["filters"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in each["reasons"].items())
        counts = (f"{each[key]:,}" for key in ("documents", "kept", "dropped"))
        rows.append((each["name"], *counts, reasons))
    total = (f"{summary[key]:,}" for key in ("documents", "kept", "dropped"))
    rows.append(("all", *total, f"{summary['bad_lines']:,} bad lines skipped"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{row[column]:>{widths[column]}}" for column in (1, 2, 3))
        + f"  {row[4]}".rstrip()
        for row in rows
    ]
    lines += [f"{name}: {count:,}" for name, count in summary["notes"].items()]
    for each in summary["filters"]:
        if "evaluation_texts_met" in each:
            lines.append(f"{each['name']}: evaluation texts met: {each['evaluation_texts_met']:,}")
            lines += [
                f"  {met['item']}: in {met['documents']:,} documents"
                for met in each["most_met"][:_SAMPLE_SIZE]
            ]
    lines += [each["problem"] for each in summary["bad_line_places"][:_SAMPLE_SIZE]]
    return printable("\n".join(lines))


def summary_json(summary: Mapping[str, Any]) -> str:
    """Return the text of summary.json."""
    return json.dumps(summary, indent=2) + "\n"
