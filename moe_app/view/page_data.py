"""Extracts what `report_run` draws: curves, heat maps and events, bounded in size."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.trainer.records.history import Event, RunHistory, finite, thin
from megatron.trainer.records.losses import BITS_PER_BYTE, LOSSES, PERPLEXITY
from megatron.trainer.records.perplexity import figures_of
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.run_dir import (
    LOAD_NAME,
    LOAD_TITLES,
    last_record,
    loads_of,
    sample_records,
    spread,
)
from megatron.trainer.records.tasks import BITS, SHOWN, numbers_of, shown_accuracies

MAX_POINTS = 1500
"""Maximum number of points per curve."""
MAX_COLUMNS = 120
"""Maximum number of columns of a heat map over time."""
MAX_LOADS = 48
"""Maximum number of records of which every expert's load is kept."""
MAX_LOAD_NUMBERS = 50_000
"""Maximum number of values in all of those together, unless three records have more."""
MAX_EVENTS = 400
"""Maximum number of events per run; the newest, saves only where there is room."""

LAYER_KEYS = {
    "layer_max_load_ratio": "highest load of each layer",
    "layer_dead_experts": "dead experts of each layer",
    "moa_layer_max_load_ratio": "highest load of each layer's attention experts",
    "moa_layer_dead_experts": "dead attention experts of each layer",
}
"""Numbers per layer that are shown over time, by their names in a record."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Describes curves on the same axes."""

    key: str
    """Its name in the page."""
    title: str
    """What it shows."""
    unit: str
    """Of the y axis; may be empty."""
    columns: dict[str, str]
    """Numbers of a step's record by their labels; `name/` stands for all below that name."""
    cuts: bool = False
    """Whether the highest few may lie above the axis: those before training has settled."""


def _loss_chart(name: str) -> str:
    """Return the key of the chart of a loss."""
    return "loss" if name == "lm_loss" else name


CHARTS = (
    *(
        Chart(key=_loss_chart(name), title="Loss", unit=unit, columns={"training": name}, cuts=True)
        for name, unit in LOSSES.items()
    ),
    Chart(
        key="rewards",
        title="Rewards",
        unit="beta x log-ratio",
        columns={
            "chosen": "rewards_chosen",
            "rejected": "rewards_rejected",
            "margin": "rewards_margin",
        },
    ),
    Chart(
        key="accuracy",
        title="Preferences met",
        unit="share",
        columns={"training": "rewards_accuracy"},
    ),
    Chart(
        key="log_probs",
        title="Log-probabilities",
        unit="nats",
        columns={"chosen": "logps_chosen", "rejected": "logps_rejected"},
    ),
    Chart(key="kl", title="KL of mismatched answers", unit="nats", columns={"training": "kl"}),
    Chart(key="perplexity", title="Validation", unit="perplexity", columns={}),
    Chart(key="bits", title="Validation", unit="bits per byte", columns={}),
    Chart(key="tasks", title="Tasks", unit=f"accuracy ({SHOWN})", columns={}),
    Chart(key="task_bits", title="Tasks", unit="bits per byte of the answer", columns={}),
    Chart(key="rate", title="Learning rate", unit="", columns={"learning rate": "learning_rate"}),
    Chart(
        key="norm",
        title="Gradient norm",
        unit="",
        columns={"gradient norm": "grad_norm"},
        cuts=True,
    ),
    Chart(
        key="speed", title="Speed", unit="tokens per second", columns={"speed": "tokens_per_second"}
    ),
    Chart(
        key="balance",
        title="Load-balancing loss",
        unit="1 is balanced",
        columns={"experts": "load_balancing_loss", "attention experts": "moa_load_balancing_loss"},
        cuts=True,
    ),
    Chart(
        key="z",
        title="Router z-loss",
        unit="",
        columns={"experts": "z_loss", "attention experts": "moa_z_loss"},
        cuts=True,
    ),
    Chart(
        key="max_load",
        title="Highest load of an expert",
        unit="1 is an even share",
        columns={"experts": "moe_max_load_ratio", "attention experts": "moa_max_load_ratio"},
        cuts=True,
    ),
    Chart(
        key="dead",
        title="Dead experts",
        unit="of all layers",
        columns={"experts": "moe_dead_experts", "attention experts": "moa_dead_experts"},
    ),
    Chart(
        key="sources",
        title="Tokens by source",
        unit="tokens",
        columns={"": "consumed_tokens_per_source/"},
    ),
    Chart(
        key="straggler",
        title="Slowest rank",
        unit="its busy time / the median's",
        columns={"slowest rank": "straggler_ratio"},
    ),
)


def page_data(runs: Sequence[tuple[str, RunHistory]]) -> dict[str, Any]:
    """Collect everything that the page draws, as JSON values.

    Args:
        runs: their names and histories; these must keep `LAYER_KEYS`.
    """
    drawn = [_run_data(name, history) for name, history in runs]
    used = {curve["chart"] for run in drawn for curve in run["curves"]}
    charts = [
        {"key": chart.key, "title": chart.title, "unit": chart.unit, "cuts": chart.cuts}
        for chart in CHARTS
        if chart.key in used
    ]
    return {"charts": charts, "runs": drawn}


def _run_data(name: str, history: RunHistory) -> dict[str, Any]:
    return {
        "name": name,
        "curves": [*_step_curves(history), *_validation_curves(history), *_task_curves(history)],
        "phases": [_phase(history, *phase) for phase in history.phases],
        "events": [_mark(history, event) for event in chosen_events(history.events)],
        "loads": _loads(history),
        "layers": _layers(history),
    }


def _step_curves(history: RunHistory) -> list[dict[str, Any]]:
    curves = []
    for chart in CHARTS:
        for label, column in chart.columns.items():
            if column.endswith("/"):
                names = [name for name in history.steps.by_name if name.startswith(column)]
                # One source has given all tokens, which the x axis says already.
                labels = {name.removeprefix(column): name for name in names} if names[1:] else {}
            else:
                labels = {label: column} if history.steps[column] else {}
            for each, found in labels.items():
                curves.append(_curve(chart.key, each, history, found))
    return curves


def _curve(chart: str, label: str, history: RunHistory, column: str) -> dict[str, Any]:
    values = history.steps[column]
    kept = thin(values, MAX_POINTS)
    steps = history.steps
    curve = {
        "chart": chart,
        "label": label,
        "iteration": [_number(steps["iteration"][index]) for index in kept],
        "tokens": _picked(steps["consumed_tokens"], kept),
        "value": _picked(values, kept),
    }
    if chart == "straggler":
        curve["rank"] = _picked(steps["straggler_rank"], kept)
    return curve


def _picked(column: Sequence[float], kept: Sequence[int]) -> list[int | float | None]:
    return [_number(column[index]) for index in kept] if column else [None] * len(kept)


def _number(value: float) -> int | float | None:
    """Convert for JSON: whole numbers to int, non-finite values to None."""
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else value


def _validation_curves(history: RunHistory) -> list[dict[str, Any]]:
    return _evaluation_curves(
        history,
        _loss_chart(history.loss_name),
        [record["valid_loss"] for record in history.evaluations],
        prefix="validation: ",
    )


def _task_curves(history: RunHistory) -> list[dict[str, Any]]:
    records = history.evaluations
    bits = [numbers_of(record, BITS) for record in records]
    return [
        *(
            curve
            for chart, figure in (("perplexity", PERPLEXITY), ("bits", BITS_PER_BYTE))
            for curve in _evaluation_curves(
                history, chart, [figures_of(record, figure) for record in records]
            )
        ),
        *_evaluation_curves(history, "tasks", [shown_accuracies(record) for record in records]),
        *_evaluation_curves(history, "task_bits", bits),
    ]


def _evaluation_curves(
    history: RunHistory,
    chart: str,
    figures: Sequence[Mapping[str, float | None]],
    *,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """Return a curve for each name in the figures of the evaluations."""
    curves = []
    for name in dict.fromkeys(name for each in figures for name in each):
        points = [
            (record, each[name])
            for record, each in zip(history.evaluations, figures, strict=True)
            if name in each
        ]
        kept = thin([math.nan if value is None else value for _, value in points], MAX_POINTS)
        chosen = [points[index] for index in kept]
        curves.append(
            {
                "chart": chart,
                "label": f"{prefix}{name}",
                "iteration": [record["iteration"] for record, _ in chosen],
                "tokens": [finite(record.get("consumed_tokens")) for record, _ in chosen],
                "value": [value for _, value in chosen],
            }
        )
    return curves


def _phase(history: RunHistory, index: int, name: str) -> dict[str, Any]:
    """Describe a phase; it begins at the last record before it."""
    steps = history.steps
    before = max(0, index - 1)
    tokens = steps["consumed_tokens"]
    return {
        "name": name,
        "iteration": _number(steps["iteration"][before]) if index else 0,
        "tokens": (_number(tokens[before]) if tokens else None) if index else 0,
    }


def _mark(history: RunHistory, event: Event) -> dict[str, Any]:
    return {
        "event": event.name,
        "detail": event.detail,
        "time": event.time,
        "iteration": event.iteration,
        "tokens": tokens_at(history, event.iteration),
    }


def chosen_events(events: Sequence[Event]) -> list[Event]:
    """Select at most `MAX_EVENTS`, in order: the newest, saves only where others leave room."""
    numbered = list(enumerate(events))
    others = [pair for pair in numbered if pair[1].name != "save"][-MAX_EVENTS:]
    saves = [pair for pair in numbered if pair[1].name == "save"]
    room = MAX_EVENTS - len(others)
    kept = others + (saves[-room:] if room else [])
    return [event for _, event in sorted(kept, key=lambda pair: pair[0])]


def tokens_at(history: RunHistory, iteration: int) -> int | None:
    """Interpolate the tokens consumed after a step; None with fewer than two records."""
    iterations, tokens = history.steps["iteration"], history.steps["consumed_tokens"]
    if len(iterations) < 2 or not tokens:
        return None
    after = min(max(1, bisect.bisect_left(iterations, iteration)), len(iterations) - 1)
    steps = iterations[after] - iterations[after - 1]
    rate = (tokens[after] - tokens[after - 1]) / steps if steps else 0.0
    found = tokens[after] + rate * (iteration - iterations[after])
    return max(0, round(found)) if math.isfinite(found) else None


def _loads(history: RunHistory) -> list[dict[str, Any]]:
    """Collect every expert's load from records spread over the run, per router type."""
    path = history.directory / LOAD_NAME
    last = loads_of(last_record(path) or {})
    numbers = sum(len(rows) * len(rows[0]) for rows in last.values())
    if not numbers:
        return []
    records, total = sample_records(path, min(MAX_LOADS, max(3, MAX_LOAD_NUMBERS // numbers)))
    return [_load_map(history, key, _shape(rows), records, total) for key, rows in last.items()]


def _load_map(
    history: RunHistory,
    key: str,
    shape: tuple[int, int],
    records: Sequence[Record],
    total: int,
) -> dict[str, Any]:
    found = [(record["iteration"], loads_of(record).get(key)) for record in records]
    fitting = [(at, rows) for at, rows in found if rows and _shape(rows) == shape]
    return {
        "title": LOAD_TITLES[key],
        "records": total,
        "iteration": [at for at, _ in fitting],
        "tokens": [tokens_at(history, at) for at, _ in fitting],
        "rows": [rows for _, rows in fitting],
    }


def _shape(rows: Sequence[Sequence[float]]) -> tuple[int, int]:
    return len(rows), len(rows[0])


def _layers(history: RunHistory) -> list[dict[str, Any]]:
    """Collect per-layer values over time; a column is the maximum of its interval of records."""
    found = []
    for key, title in LAYER_KEYS.items():
        rows = history.layers[key]
        size = len(rows[-1]) if rows else 0
        indices = [index for index, row in enumerate(rows) if len(row) == size]
        if not size or not indices:
            continue
        ends = spread(len(indices), MAX_COLUMNS)
        starts = [0, *(end + 1 for end in ends[:-1])]
        columns = [
            [
                _number(max((rows[index][layer] for index in indices[start : end + 1]), key=_order))
                for layer in range(size)
            ]
            for start, end in zip(starts, ends, strict=True)
        ]
        lasts = [indices[end] for end in ends]
        found.append(
            {
                "title": title,
                "is_count": key.endswith("dead_experts"),
                "iteration": _picked(history.steps["iteration"], lasts),
                "tokens": _picked(history.steps["consumed_tokens"], lasts),
                "columns": columns,
            }
        )
    return found


def _order(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
