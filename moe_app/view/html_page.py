"""Writes the HTML of `report_run`: one file, no network; run data is never markup or code."""

import base64
import datetime
import hashlib
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from megatron.trainer.records.history import RunHistory, RunState, duration, validation_results
from moe_app.view.curve_figure import curve_figure
from moe_app.view.figure_style import TEMPLATES
from moe_app.view.load_figure import load_figure
from moe_app.view.page_data import chosen_events, page_data

STYLE = Path(__file__).parent / "assets" / "page.css"
_SCRIPT = """
const { figures, templates } = JSON.parse(document.getElementById("data").textContent);
const darkness = matchMedia("(prefers-color-scheme: dark)");
const tools = [["toImage"], ["zoom2d", "pan2d"], ["autoScale2d", "resetScale2d"]];
const settings = { responsive: true, displaylogo: false, modeBarButtons: tools };
const template = (isDark) => (isDark ? templates.dark : templates.light);
figures.forEach(({ data, layout }, number) => {
  const themed = { ...layout, template: template(darkness.matches) };
  Plotly.newPlot(`figure-${number}`, data, themed, settings);
});
const restyle = (isDark) => figures.forEach((_, number) =>
  Plotly.relayout(`figure-${number}`, { template: template(isDark) }));
darkness.addEventListener("change", () => restyle(darkness.matches));
addEventListener("beforeprint", () => restyle(false));
addEventListener("afterprint", () => restyle(darkness.matches));
"""
_HELP = (
    "Drag across a chart to look closer, click twice to see the whole run again; a click on a run's"
    " name hides it, two clicks hide the others. Events: | saves, \u25b6 starts and resumes, \u00d7"
    " skipped steps, \u25c0 rewinds, \u25a0 ends."
)
Runs = Sequence[tuple[str, RunHistory]]
_MAX_VALUE_LETTERS = 2000


def make_page(runs: Runs, states: Sequence[RunState], *, title: str, written: str) -> str:
    """Write the page.

    Args:
        runs: names and histories, see `page_data.page_data`.
        states: whether each of them goes on.
        title: of the page.
        written: when, for the reader.
    """
    library = get_plotlyjs()
    # Scripts are known by their digests. plotly styles what it draws inline, and draws heat maps
    # into images.
    policy = (
        f"default-src 'none'; script-src {_digest(library)} {_digest(_SCRIPT)};"
        " style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    names = [name for name, _ in runs]
    drawn = _figures(runs)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
        "</head>",
        "<body>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">written {_text(written)}</p>',
        "<h2>Summary</h2>",
        _table(["", *names], summary_rows(runs, states)),
        '<noscript><p class="failed">The curves need JavaScript.</p></noscript>',
        *_figure_places(drawn),
        "<h2>Events</h2>",
        _events(runs),
        *_settings(runs),
        f"<script>{library}</script>",
        f'<script type="application/json" id="data">{_data(drawn)}</script>',
        f"<script>{_SCRIPT}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _figures(runs: Runs) -> list[tuple[str, go.Figure]]:
    """Draw all figures, each with the name of its run, "" for all runs."""
    data = page_data(runs)
    drawn = [("", curve_figure(data))] if data["charts"] else []
    for run in data["runs"]:
        if run["loads"] or run["layers"]:
            drawn.append((run["name"], load_figure(run)))
    return drawn


def _figure_places(drawn: Sequence[tuple[str, go.Figure]]) -> list[str]:
    """Write a placeholder per figure, under a heading with its run's name."""
    parts = ["<h2>Curves</h2>"] if drawn and not drawn[0][0] else []
    has_maps = False
    for number, (name, _) in enumerate(drawn):
        if name and not has_maps:
            has_maps = True
            parts.append("<h2>Expert load</h2>")
        parts += [f"<h3>{_text(name)}</h3>"] if name else []
        parts.append(f'<div class="figure" id="figure-{number}"></div>')
        if not name:
            parts.append(f'<p class="quiet only-screen">{_HELP}</p>')
    return parts if has_maps else [*parts, "<h2>Expert load</h2>", "<p>No run has experts.</p>"]


def _data(drawn: Sequence[tuple[str, go.Figure]]) -> str:
    """Serialise the figures to JSON in which no HTML parser finds an end tag or a comment."""
    values = {"figures": [figure.to_plotly_json() for _, figure in drawn], "templates": TEMPLATES}
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def summary_rows(runs: Runs, states: Sequence[RunState]) -> list[list[str]]:
    """Build the summary table: a row per quantity, a column per run."""
    answers = [_answers(history, state) for (_, history), state in zip(runs, states, strict=True)]
    questions = dict.fromkeys(question for each in answers for question in each)
    order = sorted(questions, key=lambda question: _RANKS.get(question.partition(":")[0], 0))
    return [[question, *(each.get(question, "-") for each in answers)] for question in order]


_QUESTIONS = (
    "state",
    "iterations",
    "tokens",
    "training loss",
    "validation loss",
    "median speed",
    "median model FLOPs",
    "training time",
    "time from first to last event",
    "interruptions",
    "skipped steps",
    "rewinds",
    "highest load of an expert",
    "dead experts",
    "slowest rank",
    "damaged lines",
)
_RANKS = {question: rank for rank, question in enumerate(_QUESTIONS)}


def _answers(history: RunHistory, state: RunState) -> dict[str, str]:
    steps = history.steps
    planned = f" of {history.train_iters:,}" if history.train_iters else ""
    names = [event.name for event in history.events]
    known = {
        "state": state.text,
        "iterations": f"{history.iteration:,}{planned}",
        "tokens": _formatted(steps.last("consumed_tokens"), ",.0f"),
        "training loss": _formatted(steps.last("lm_loss"), ".4f"),
        "median speed": _median(steps["tokens_per_second"], ",.0f", " tokens/s"),
        "median model FLOPs": _median(steps["model_tflops"], ",.4g", " TFLOP/s per rank"),
        "training time": _time(history.training_seconds()),
        "time from first to last event": _time(event_seconds(history)),
        "skipped steps": f"{history.skipped:,}",
        "highest load of an expert": _formatted(
            steps.last("moe_max_load_ratio"), ".2f", " x an even share"
        ),
        "dead experts": _formatted(steps.last("moe_dead_experts"), ",.0f"),
    }
    for result in validation_results(history.evaluations, {}):
        best = ""
        if result.best_iteration is not None:
            best = f" (best {result.best:.4f} at {result.best_iteration:,})"
        known[f"validation loss: {result.name}"] = _formatted(result.last, ".4f") + best
    if history.events:
        known["interruptions"] = f"{names.count('resume'):,}"
        known["rewinds"] = f"{names.count('rewind'):,}"
    ranks = [rank for rank in steps["straggler_rank"] if rank == rank]
    if ranks:
        usual = statistics.mode(ranks)
        share = ranks.count(usual) / len(ranks)
        known["slowest rank"] = f"{usual:.0f}, in {share:.0%} of {len(ranks):,} records"
    if history.unreadable:
        known["damaged lines"] = f"{history.unreadable:,}"
    return {question: answer for question, answer in known.items() if answer}


def event_seconds(history: RunHistory) -> float | None:
    """Return seconds from first to last event, queue time included; None if unknown."""
    times = []
    for event in history.events:
        try:
            times.append(datetime.datetime.fromisoformat(event.time.replace("Z", "+00:00")))
        except ValueError:
            continue
    if len(times) < 2:
        return None
    try:
        return (times[-1] - times[0]).total_seconds()
    except TypeError:  # one has a time zone and the other has not
        return None


def setting_differences(settings: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """List the settings that differ between runs, a row each."""
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [[key, *(each.get(key, "not set") for each in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(runs: Runs) -> list[str]:
    settings = [history.settings for _, history in runs]
    names = [name for name, _ in runs]
    parts = []
    if len(runs) > 1:
        rows = setting_differences(settings)
        parts.append("<h2>Settings that differ</h2>")
        parts.append(
            _table(["", *names], rows) if rows else "<p>None: all runs have the same settings.</p>"
        )
    else:
        parts.append("<h2>Settings</h2>")
    keys = dict.fromkeys(key for each in settings for key in each)
    every = [[key, *(each.get(key, "not set") for each in settings)] for key in keys]
    parts.append(f"<details><summary>all {len(every)} settings</summary>")
    parts.append(_table(["", *names], every) + "</details>")
    return parts


def _events(runs: Runs) -> str:
    rows = []
    left_out = 0
    for name, history in runs:
        chosen = chosen_events(history.events)
        left_out += len(history.events) - len(chosen)
        rows += [
            (each.time, name, f"{each.iteration:,}", each.name, each.detail) for each in chosen
        ]
    if not rows:
        return "<p>None is recorded.</p>"
    rows.sort(key=lambda row: row[0])
    note = f'<p class="quiet">{left_out:,} older ones are left out.</p>' if left_out else ""
    cells = [[time.replace("T", " "), *rest] for time, *rest in rows]
    table = _table(["time", "run", "iteration", "event", ""], cells, fixed=(0, 2, 3))
    shown = f"<details open><summary>{len(rows):,} events</summary>{table}</details>"
    return note + shown


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, fixed: Sequence[int] | None = None
) -> str:
    """Write a table; the first column is of row headers unless `fixed` gives unbreakable ones."""
    lines = ['<div class="scroll"><table><thead><tr>']
    lines += [f'<th scope="col">{_text(name)}</th>' for name in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for column, value in enumerate(row):
            if fixed is None and column == 0:
                cells.append(f'<th scope="row">{_text(value)}</th>')
            elif fixed is not None and column in fixed:
                cells.append(f'<td class="fixed">{_text(value)}</td>')
            else:
                cells.append(f"<td>{_text(value)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _text(value: str) -> str:
    """Escape for text and attributes, truncated to `_MAX_VALUE_LETTERS`."""
    if len(value) > _MAX_VALUE_LETTERS:
        value = f"{value[:_MAX_VALUE_LETTERS]} … ({len(value):,} characters)"
    return html.escape(value, quote=True)


def _digest(text: str) -> str:
    """Return a script's SHA-256 as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _formatted(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _median(values: Sequence[float], form: str, unit: str) -> str:
    known = [value for value in values if value == value]
    return _formatted(statistics.median(known) if known else None, form, unit)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
