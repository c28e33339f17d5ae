"""Write evaluations beside each other and beside the papers' figures: a page, CSV and PNG.

    python tools/report_eval.py runs/a/eval runs/b/eval --output report

docs/evaluation.md says what is compared with what.
"""

import argparse
import base64
import csv
import datetime
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_bytes, write_text
from moe_app.command_line import printable, program, report_errors
from moe_app.evaluate.comparison_charts import draw_charts
from moe_app.evaluate.published import Evaluation, PublishedTable, read_evaluations, read_published
from moe_app.view.page_parts import escaped, html_table, page_head

Rows = Sequence[tuple[str, bool, Sequence[float | None]]]
"""Name, whether it is an evaluation of ours, and values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that `argv` asks for; return the exit status."""
    args = make_parser().parse_args(argv)
    return report_errors(lambda: write_report([Path(each) for each in args.results], args.output))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("report_eval", command="report-eval"),
        description="Write evaluations beside each other and beside the papers' figures.",
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="an evaluation's --output, or its results.json"
    )
    parser.add_argument(
        "--output",
        default="eval-report",
        metavar="DIR",
        help="gets report.html, scores.csv and a PNG of each figure (%(default)s)",
    )
    return parser


def write_report(paths: Sequence[Path], output: str) -> None:
    """Write the report and say where.

    Raises:
        UserError: results cannot be read, or the report cannot be written.
    """
    evaluations = read_evaluations(paths)
    tables = read_published()
    charts = draw_charts(tables, evaluations)
    directory = Path(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "scores.csv", csv_text(tables, evaluations))
        for name, (_, image) in charts.items():
            write_bytes(directory / f"{name}.png", image)
        page = make_page(tables, evaluations, charts)
        write_text(directory / "report.html", page, errors="replace")
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written: {error.strerror or error}; give a directory"
            " that can be made and written to"
        ) from error
    names = ", ".join(each.name for each in evaluations)
    print(printable(f"{directory / 'report.html'}: {len(tables)} tables on {names}"))


def rows_of(table: PublishedTable, evaluations: Sequence[Evaluation]) -> Rows:
    """Return the rows of a table: of evaluations that have one of its columns, then published."""
    ours = [(each.name, True, table.row_of(each)) for each in evaluations]
    found = [each for each in ours if any(value is not None for value in each[2])]
    return [*found, *((name, False, values) for name, values in table.rows.items())]


def csv_text(tables: Sequence[PublishedTable], evaluations: Sequence[Evaluation]) -> str:
    """Return every value, one a line: those of the tables, then all metrics of evaluations."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "model", "column", "value", "unit", "source"])
    for table in tables:
        for name, is_ours, values in rows_of(table, evaluations):
            source = "evaluation" if is_ours else table.source
            for (column, _), value in zip(table.columns, values, strict=True):
                if value is not None:
                    writer.writerow([table.name, name, column, f"{value:g}", table.unit, source])
    for evaluation in evaluations:
        for task, metric, value in _metrics(evaluation):
            writer.writerow(["all", evaluation.name, f"{task} {metric}", value, "", "evaluation"])
    return text.getvalue()


def make_page(
    tables: Sequence[PublishedTable],
    evaluations: Sequence[Evaluation],
    charts: Mapping[str, tuple[str, bytes]],
) -> str:
    """Write the page: one file, no network, no script.

    Args:
        tables: of the papers.
        evaluations: set before the papers' rows, marked with an arrow.
        charts: caption and PNG of each figure.
    """
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = "Evaluations"
    parts = [
        *page_head(title),
        "<body>",
        f"<h1>{title}</h1>",
        f'<p class="quiet">{escaped(", ".join(each.name for each in evaluations))}; written'
        f" {escaped(written)}. ▸ marks these; other rows are published.</p>",
    ]
    for table in tables:
        unit = f", {table.unit}" if table.unit else ""
        parts.append(f"<h2>{escaped(table.title + unit)}</h2>")
        digits = ".1f" if table.unit == "%" else ".4g"
        rows = [
            [f"▸ {name}" if is_ours else name, *(_shown(value, digits) for value in values)]
            for name, is_ours, values in rows_of(table, evaluations)
        ]
        parts.append(html_table(["", *(name for name, _ in table.columns)], rows))
        parts.append(f'<p class="quiet">Source: {escaped(table.source)}.</p>')
    for name, (caption, image) in charts.items():
        data = base64.b64encode(image).decode("ascii")
        parts.append(
            f'<figure><img alt="{escaped(name)}" src="data:image/png;base64,{data}"'
            ' style="max-width:100%;background:#fff">'
            f'<figcaption class="quiet">{escaped(caption)}</figcaption></figure>'
        )
    parts += ["<h2>All metrics</h2>", _all_metrics(evaluations)]
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _all_metrics(evaluations: Sequence[Evaluation]) -> str:
    """Write a table of every metric, a column an evaluation."""
    columns = [
        {(task, metric): value for task, metric, value in _metrics(each)} for each in evaluations
    ]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [
        [f"{task} {metric}", *(_shown(column.get((task, metric))) for column in columns)]
        for task, metric in keys
    ]
    return html_table(["", *(each.name for each in evaluations)], rows)


def _metrics(evaluation: Evaluation) -> list[tuple[str, str, float]]:
    """Return task, metric and value of all that an evaluation has."""
    return [
        (task, metric, value)
        for task, metrics in evaluation.results.items()
        if isinstance(metrics, dict)
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _shown(value: float | None, format_spec: str = ".4g") -> str:
    """Return a number for a table; a dash for none."""
    return "-" if value is None else f"{value:{format_spec}}"
