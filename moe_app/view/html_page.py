"""Writes the HTML of `report_run`: one file, no network; run data is never markup or code."""

import datetime
import statistics
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from megatron.trainer.records.history import RunHistory, RunState, duration, validation_results
from megatron.trainer.records.perplexity import last_figures
from megatron.trainer.records.tasks import SHOWN, task_results
from moe_app.view.curve_figure import curve_figure
from moe_app.view.load_figure import load_figure
from moe_app.view.page_data import chosen_events, page_data
from moe_app.view.page_parts import escaped, html_table, page_head, page_scripts

_HELP = (
    "Drag across a chart to look closer, click twice to see the whole run again; a click on a run's"
    " name hides it, two clicks hide the others. Events: | saves, \u25b6 starts and resumes, \u00d7"
    " skipped steps, \u25c0 rewinds, \u25a0 ends."
)
Runs = Sequence[tuple[str, RunHistory]]


def make_page(runs: Runs, states: Sequence[RunState], *, title: str, written: str) -> str:
    """Write the page.

    Args:
        runs: names and histories, see `page_data.page_data`.
        states: whether each of them goes on.
        title: of the page.
        written: when, for the reader.
    """
    names = [name for name, _ in runs]
    drawn = _figures(runs)
    parts = [
        *page_head(title),
        "<body>",
        f"<h1>{escaped(title)}</h1>",
        f'<p class="quiet">written {escaped(written)}</p>',
        "<h2>Summary</h2>",
        html_table(["", *names], summary_rows(runs, states)),
        '<noscript><p class="failed">The curves need JavaScript.</p></noscript>',
        *_figure_places(drawn),
        "<h2>Events</h2>",
        _events(runs),
        *_settings(runs),
        *page_scripts([figure for _, figure in drawn]),
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
        parts += [f"<h3>{escaped(name)}</h3>"] if name else []
        parts.append(f'<div class="figure" id="figure-{number}"></div>')
        if not name:
            parts.append(f'<p class="quiet only-screen">{_HELP}</p>')
    return parts if has_maps else [*parts, "<h2>Expert load</h2>", "<p>No run has experts.</p>"]


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
    "perplexity",
    "bits per byte",
    "task accuracy",
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
        "training loss": _formatted(steps.last(history.loss_name), ".4f"),
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
    for name, (perplexity, bits) in last_figures(history.evaluations).items():
        known[f"perplexity: {name}"] = _formatted(perplexity, ",.2f")
        known[f"bits per byte: {name}"] = _formatted(bits, ".4f")
    known |= _task_answers(history)
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


def _task_answers(history: RunHistory) -> dict[str, str]:
    """Return the last scores of each task, and the best accuracy."""
    known = {}
    for task in task_results(history.evaluations):
        best = ""
        if task.best is not None and task.best_iteration is not None:
            best = f" (best {task.best:.1%} at {task.best_iteration:,})"
        accuracy = _formatted(task.accuracy.get(SHOWN), ".1%")
        bits = _formatted(task.bits_per_byte, ".3f")
        known[f"task accuracy: {task.name}"] = f"{accuracy}{best}, {bits} bits per byte"
    return known


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
            html_table(["", *names], rows)
            if rows
            else "<p>None: all runs have the same settings.</p>"
        )
    else:
        parts.append("<h2>Settings</h2>")
    keys = dict.fromkeys(key for each in settings for key in each)
    every = [[key, *(each.get(key, "not set") for each in settings)] for key in keys]
    parts.append(f"<details><summary>all {len(every)} settings</summary>")
    parts.append(html_table(["", *names], every) + "</details>")
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
    table = html_table(["time", "run", "iteration", "event", ""], cells, fixed=(0, 2, 3))
    shown = f"<details open><summary>{len(rows):,} events</summary>{table}</details>"
    return note + shown


def _formatted(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _median(values: Sequence[float], form: str, unit: str) -> str:
    known = [value for value in values if value == value]
    return _formatted(statistics.median(known) if known else None, form, unit)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
