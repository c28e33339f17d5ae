"""Writes all measures on one self-contained HTML page, and their figures and tables beside it."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from megatron.trainer.errors import printable
from moe_app.analyze.collection import Collection, require_comparable
from moe_app.analyze.interactive_figures import draw_interactive
from moe_app.analyze.measures import Measured
from moe_app.analyze.static_figures import draw_static
from moe_app.analyze.steps import STEPS, Figures, Step, latest, open_collections
from moe_app.analyze.tables import Table, write_file, write_tables
from moe_app.view.page_parts import escaped, html_table, page_head, page_scripts

PAGE_NAME = "report.html"
_MOST_ROWS = 240
_TOKENS_SHOWN = 5
_EXPERTS_SHOWN = 16
_ONE_CHECKPOINT = (
    "it compares checkpoints of a run, and one is given; collect the same text with earlier ones,"
    " and give them all to --input"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `report`: those of all measures."""
    for step in STEPS:
        step.add_flags(parser)
    parser.set_defaults(may_lack_weights=True)
    parser.add_argument("--title", default="Routing", metavar="TEXT", help="of the page")


def run_report(args: argparse.Namespace) -> None:
    """Measure, draw and write everything.

    Raises:
        UserError: an input cannot be used, or the output cannot be written.
    """
    collections = open_collections(args)
    last, output = latest(collections), Path(args.output)
    require_comparable([last, *collections])
    done: list[tuple[Step, Measured, Figures]] = []
    for step in STEPS:
        if step.name == "saturation" and len(collections) < 2:
            done.append((step, Measured(tables=[], missing=_ONE_CHECKPOINT), []))
            continue
        given = collections if step.name == "saturation" else [last]
        measured, figures = step.run(given, args)
        if measured.missing:
            print(printable(f"{step.name}: not measured: {measured.missing}"))
        write_tables(output, measured.tables)
        draw_static(output, figures)
        done.append((step, measured, figures))
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = make_routing_page(last, done, title=args.title, written=written)
    path = output / PAGE_NAME
    write_file(path, page.encode("utf-8", errors="replace"))
    print(
        printable(f"{path}: {path.stat().st_size / 1e6:.1f} MB, its figures and tables beside it")
    )


def make_routing_page(
    collection: Collection,
    done: Sequence[tuple[Step, Measured, Figures]],
    *,
    title: str,
    written: str,
) -> str:
    """Write the page.

    Args:
        collection: that all measures but saturation are of.
        done: the measures, with tables and figures.
        title: of the page.
        written: when, for the reader.
    """
    drawn: list[go.Figure] = []
    parts = [*page_head(title), "<body>", f"<h1>{escaped(title)}</h1>"]
    parts.append(f'<p class="quiet">written {escaped(written)}</p>')
    parts.append("<h2>Collection</h2>" + html_table(["", ""], _facts(collection)))
    parts.append(
        '<noscript><p class="failed">The figures need JavaScript; the PNG and SVG files beside this'
        " page do not.</p></noscript>"
    )
    for step, measured, figures in done:
        parts.append(f"<h2>{escaped(step.title)}</h2>")
        parts.append(f"<p>{escaped(step.meaning)}</p>")
        if measured.missing:
            parts.append(f'<p class="failed">Not measured: {escaped(measured.missing)}</p>')
        for figure in figures:
            parts.append(f"<h3>{escaped(figure.title)}</h3>")
            parts.append(f"<p>{escaped(figure.about)}</p>")
            parts.append(f'<div class="figure" id="figure-{len(drawn)}"></div>')
            drawn.append(draw_interactive(figure))
        parts += _tables(measured)
    parts += [*page_scripts(drawn), "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _facts(collection: Collection) -> list[list[str]]:
    manifest = collection.manifest
    sizes = {
        kind: {(router.num_experts, router.topk) for router in collection.routers(kind)}
        for kind in collection.kinds()
    }
    routers = "; ".join(
        f"{len(collection.routers(kind))} {kind} routers, "
        + " and ".join(f"{experts} experts, k = {topk}" for experts, topk in sorted(found))
        for kind, found in sizes.items()
    )
    tokens = f"{manifest.num_tokens:,} in windows of {manifest.seq_length}"
    return [
        ["checkpoint", manifest.source],
        ["iteration", f"{manifest.iteration:,}"],
        ["model hash", manifest.model_hash[:16]],
        ["routers", routers],
        ["tokens", tokens],
        ["texts", ", ".join(manifest.domains)],
        ["data hash", manifest.data_hash[:16]],
        ["precision", manifest.precision],
        ["layers", "counted from 0"],
    ]


def _tables(measured: Measured) -> list[str]:
    """Write small tables, and each expert's tokens; all are beside the page as files."""
    parts = []
    for table in measured.tables:
        if table.name == "vocabulary_tokens":
            parts.append(_token_table(table))
        elif 0 < len(table) <= _MOST_ROWS:
            parts.append(f"<details><summary>{escaped(table.name)}.csv</summary>")
            rows = [[_shown(value) for value in row.values()] for row in table.rows()]
            parts.append(html_table(list(table.columns), rows) + "</details>")
    names = ", ".join(f"{table.name}.csv" for table in measured.tables)
    if names:
        parts.append(f'<p class="quiet">Numbers: {escaped(names)}, and .parquet.</p>')
    return parts


def _token_table(table: Table) -> str:
    """Write the tokens that experts of the middle layer serve most exclusively (table 8)."""
    rows = table.rows()
    if not rows:
        return ""
    layers = sorted({row["layer"] for row in rows})
    middle = layers[(len(layers) - 1) // 2]
    mine = [row for row in rows if row["layer"] == middle and row["rank"] < _TOKENS_SHOWN]
    cells: dict[tuple[str, int], dict[str, list[str]]] = {}
    for row in mine:
        shown = f"{row['token']} ({100 * row['share']:.0f} %)"
        cells.setdefault((row["kind"], row["expert"]), {}).setdefault(row["variant"], []).append(
            shown
        )
    best = {
        key: max(row["share"] for row in mine if (row["kind"], row["expert"]) == key)
        for key in cells
    }
    order = sorted(cells, key=lambda key: (key[0], -best[key], key[1]))[:_EXPERTS_SHOWN]
    body = [
        [f"{kind} {expert}", *(", ".join(cells[kind, expert].get(v, [])) for v in _VARIANTS)]
        for kind, expert in order
    ]
    head = ["expert", "input", "predicted", "ground truth"]
    return (
        f"<h3>Most specialised tokens of experts in layer {middle}, first expert (k = 1)</h3>"
        + html_table(head, body)
    )


_VARIANTS = ("input", "predicted", "ground_truth")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
