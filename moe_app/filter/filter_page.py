"""Shows the summary of a filtered corpus as one HTML page that needs nothing else."""

import json
from collections.abc import Mapping
from typing import Any

from moe_app.plain_page import Markup, page_text, plain_page, plain_table


def filter_page(summary: Mapping[str, Any]) -> str:
    """Return the page; whatever the documents hold is shown as text."""
    filters = [
        [each["name"], each["documents"], each["kept"], each["dropped"], _pairs(each["reasons"])]
        for each in summary["filters"]
    ]
    total = [summary[key] for key in ("documents", "kept", "dropped")]
    filters.append(["all", *total, f"{summary['bad_lines']:,} bad lines skipped"])
    files = [
        [each[key] for key in ("file", "documents", "kept", "dropped", "bad_lines")]
        for each in summary["files"]
    ]
    samples = [
        [f"{each['file']}:{each['line']}", f"{spec['name']}: {each['reason']}", _sample(each)]
        for spec in summary["filters"]
        for each in spec["sample"]
    ]
    met = [
        [each["item"], each["documents"]]
        for spec in summary["filters"]
        for each in spec.get("most_met", ())
    ]
    bad = [[each["problem"]] for each in summary["bad_line_places"]]
    notes = [[name, count] for name, count in summary["notes"].items()]
    tables = [
        plain_table("Filters", ["filter", "documents", "kept", "dropped", "reasons"], filters),
        plain_table("Counts", ["what", "number"], notes),
        plain_table("Files", ["file", "documents", "kept", "dropped", "bad lines"], files),
        plain_table(
            "Dropped documents, the first of each filter", ["where", "why", "text"], samples
        ),
        plain_table("Evaluation texts met, the most frequent", ["text", "documents"], met),
        plain_table("Bad lines", ["problem"], bad),
    ]
    return plain_page("Filtered corpus", tables)


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _sample(document: Mapping[str, Any]) -> Markup:
    detail = json.dumps(document["detail"], ensure_ascii=False)
    return Markup(f"<pre>{page_text(document['text'])}</pre>{page_text(detail)}")
