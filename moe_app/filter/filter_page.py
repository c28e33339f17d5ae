"""Shows the summary of a filtered corpus as one HTML page that needs nothing else."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from megatron.trainer.errors import printable

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.2em .6em;text-align:left;"
    "border-bottom:1px solid #ccc;vertical-align:top}td.n{text-align:right;"
    "font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;margin:0;font-size:12px}"
)


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
        [f"{each['file']}:{each['line']}", f"{spec['name']}: {each['reason']}", each]
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
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Filtered corpus</title>",
        f"<style>{_STYLE}</style><h1>Filtered corpus</h1>",
        _table("Filters", ["filter", "documents", "kept", "dropped", "reasons"], filters),
        _table("Counts", ["what", "number"], notes),
        _table("Files", ["file", "documents", "kept", "dropped", "bad lines"], files),
        _table("Dropped documents, the first of each filter", ["where", "why", "text"], samples),
        _table("Evaluation texts met, the most frequent", ["text", "documents"], met),
        _table("Bad lines", ["problem"], bad),
    ]
    return "\n".join(part for part in parts if part) + "\n</html>\n"


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _table(title: str, head: Iterable[str], rows: list[list[Any]]) -> str:
    if not rows:
        return ""
    heads = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{heads}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"<td class=n>{value:,}</td>"
    if isinstance(value, Mapping):
        detail = json.dumps(value["detail"], ensure_ascii=False)
        return f"<td><pre>{_text(value['text'])}</pre>{_text(detail)}</td>"
    return f"<td>{_text(str(value))}</td>"


def _text(value: str) -> str:
    return escape(printable(value).encode("utf-8", "replace").decode("utf-8"))
