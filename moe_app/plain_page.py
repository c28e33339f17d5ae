"""Writes a page of tables that needs nothing else; whatever data hold is shown as text."""

from collections.abc import Iterable, Sequence
from html import escape

from megatron.trainer.errors import printable

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.2em .6em;text-align:left;"
    "border-bottom:1px solid #ccc;vertical-align:top}td.n{text-align:right;"
    "font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;margin:0;font-size:12px}"
    "meter{width:100%;min-width:8em}"
)


class Markup(str):
    """Marks the content of a cell that is HTML already."""


def plain_page(title: str, tables: Iterable[str]) -> str:
    """Return the page that has these tables, empty ones left out."""
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{page_text(title)}</title>",
        f"<style>{_STYLE}</style><h1>{page_text(title)}</h1>",
    )
    return "\n".join([*head, *(each for each in tables if each)]) + "\n</html>\n"


def plain_table(title: str, head: Iterable[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table under a heading; "" without rows."""
    if not rows:
        return ""
    heads = "".join(f"<th>{page_text(each)}</th>" for each in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<h2>{page_text(title)}</h2><table><tr>{heads}</tr>{body}</table>"


def share_bar(share: float) -> Markup:
    """Return a bar for a share of 0 to 1."""
    return Markup(f"<meter value={share:.4f}>{share:.1%}</meter>")


def page_text(value: str) -> str:
    """Return a text as HTML, control characters and lone surrogates spelled out or replaced."""
    return escape(printable(value).encode("utf-8", "replace").decode("utf-8"))


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return f"<td>{value}</td>"
    if isinstance(value, int):
        return f"<td class=n>{value:,}</td>"
    if isinstance(value, float):
        return f"<td class=n>{value:,.2f}</td>"
    return f"<td>{'' if value is None else page_text(str(value))}</td>"
