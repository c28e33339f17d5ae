"""Draws the curves of all runs in one figure: charts that share an x axis, and the events."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from moe_app.view.figure_style import (
    BUTTONS,
    QUIET,
    Data,
    FigureParts,
    axis_name,
    label,
    run_colour,
    stack,
)

DASHES = ("solid", "dash", "dot", "longdash", "dashdot", "longdashdot")
SYMBOLS = {
    "start": "triangle-right",
    "resume": "triangle-right",
    "branch": "triangle-right",
    "skip": "x-thin",
    "rewind": "triangle-left",
    "fallback": "cross-thin",
    "end": "square",
}
"""Marks of events by their names; any other is a tick."""
LINES = frozenset({"rewind", "resume", "skip", "fallback"})
"""Events that are drawn as lines across the first chart too."""
X_TITLES = {"tokens": "tokens", "iteration": "iterations"}

_MARGIN = {"l": 64, "r": 16, "t": 136, "b": 44}
_FIRST_HEIGHT, _HEIGHT, _GAP, _EVENTS_GAP, _LEGEND = 320, 170, 60, 30, 18
_MAX_LEGEND = 12
_LOST_HEIGHT = 0.97
"""Where in the first chart values are marked that were not finite."""


def curve_figure(data: Data) -> go.Figure:
    """Draw `page_data` of one or several runs, with at least one chart."""
    charts = _CurveCharts(data)
    for number, chart in enumerate(data["charts"], start=1):
        charts.add_chart(number, chart)
    if charts.has_events:
        charts.add_events()
    return charts.finish()


class _CurveCharts:
    """Collects traces, each with its x over tokens and over iterations.

    Charts have the axes 1 on. The events' row lies below the first chart and has the next axis; the
    last y axis lies on the first chart and goes from 0 to 1.

    Args:
        data: all runs.
    """

    def __init__(self, data: Data) -> None:
        self._runs: Sequence[Data] = data["runs"]
        curves = [curve for run in self._runs for curve in run["curves"]]
        has_tokens = all(any(x is not None for x in curve["tokens"]) for curve in curves)
        self._x = "tokens" if has_tokens else "iteration"
        self.has_events = any(run["events"] for run in self._runs)
        self._labels = {chart["key"]: _labels_of(chart, self._runs) for chart in data["charts"]}
        self._num_charts = len(data["charts"])
        self._parts = FigureParts()
        self._xs: list[Data] = []
        self._linear: dict[str, Any] = {}
        self._height = self._place_axes()

    @property
    def _event_axis(self) -> int:
        return self._num_charts + 1

    @property
    def _event_axes(self) -> list[int]:
        return [self._event_axis] if self.has_events else []

    @property
    def _overlay(self) -> int:
        return self._num_charts + 2

    def _place_axes(self) -> int:
        heights = [_FIRST_HEIGHT, *[_HEIGHT] * (self._num_charts - 1)]
        above = [_GAP + _LEGEND * (len(each) > 1) for each in self._labels.values()][1:]
        numbers = list(range(1, self._num_charts + 1))
        if self.has_events:
            heights.insert(1, 18 * len(self._runs) + 14)
            above.insert(0, _EVENTS_GAP)
            numbers.insert(1, self._event_axis)
        domains, height = stack(heights, above)
        for number, domain in zip(numbers, domains, strict=True):
            self._parts.set(axis_name("y", number), domain=domain, anchor=f"x{number}")
            self._parts.set(
                axis_name("x", number),
                anchor=f"y{number}",
                matches=None if number == 1 else "x",
                showticklabels=number != 1 or not self.has_events,
            )
        hidden = {"visible": False, "fixedrange": True, "range": [0, 1]}
        self._parts.set(axis_name("y", self._overlay), overlaying="y", anchor="x", **hidden)
        return height

    def add_chart(self, number: int, chart: Data) -> None:
        """Draw a chart's curves in all runs, on axes `number`."""
        labels = self._labels[chart["key"]]
        values = []
        for run_number, run in enumerate(self._runs):
            for curve in run["curves"]:
                if curve["chart"] == chart["key"]:
                    self._add_curve(number, run_number, curve, labels.index(curve["label"]))
                    values += [value for value in curve["value"] if value is not None]
        notes = [chart["unit"]] if chart["unit"] else []
        cut = cut_of(values) if chart["cuts"] else None
        if cut is not None:
            margin = 0.05 * (cut - min(values))
            shown = [min(values) - margin, cut + margin]
            self._linear[f"{axis_name('y', number)}.range"] = shown
            self._parts.set(axis_name("y", number), range=shown)
            notes.append(f"values up to {max(values):.4g} lie above")
        if chart["key"] == "rate":
            self._parts.set(axis_name("y", number), exponentformat="e")
        top = self._parts.top(axis_name("y", number))
        has_legend = len(labels) > 1
        text = f"<b>{chart['title']}</b>  {'; '.join(notes)}"
        self._parts.add_title(text, top, shift=4 + _LEGEND * has_legend)
        if has_legend:
            self._add_dash_legend(number, labels, top)

    def _add_curve(self, number: int, run_number: int, curve: Data, dash: int) -> None:
        whose = f"{label(self._runs[run_number]['name'])}, " if len(self._runs) > 1 else ""
        where: Sequence[Any] = curve["iteration"]
        hover = "%{y:.6~g} at iteration %{customdata:,}"
        if "rank" in curve:
            where = list(zip(curve["iteration"], curve["rank"], strict=True))
            hover = "%{y:.6~g} at iteration %{customdata[0]:,}, rank %{customdata[1]}"
        self._add(
            curve,
            number,
            run_number,
            name=f"{whose}{label(curve['label'])}",
            y=curve["value"],
            mode="lines" if len(curve["value"]) > 1 else "markers",
            line={"width": 1.4, "dash": DASHES[dash % len(DASHES)]},
            customdata=where,
            hovertemplate=hover,
            meta={"chart": curve["chart"], "label": curve["label"]},
        )
        lost = [index for index, value in enumerate(curve["value"]) if value is None]
        if number == 1 and lost:
            self._add(
                {key: [curve[key][index] for index in lost] for key in X_TITLES},
                self._overlay,
                run_number,
                y=[_LOST_HEIGHT] * len(lost),
                mode="markers",
                marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5}},
                hoverinfo="skip",
                meta={"lost": curve["label"]},
            )

    def add_events(self) -> None:
        """Mark events in a row of their own, one line per run, and some across the first chart."""
        for run_number, run in enumerate(self._runs):
            events = run["events"]
            texts = [
                f"{label(each['event'])} at {each['iteration']:,}: {label(each['detail'])}"
                for each in events
            ]
            self._add(
                {key: [event[key] for event in events] for key in X_TITLES},
                self._event_axis,
                run_number,
                name=label(run["name"]),
                y=[run_number] * len(events),
                mode="markers",
                marker={
                    "symbol": [SYMBOLS.get(event["event"], "line-ns") for event in events],
                    "size": 9,
                    "line": {"width": 1.4},
                },
                text=texts,
                hovertemplate="%{text}",
                meta={"events": [event["event"] for event in events]},
            )
            self._add_event_lines(run_number, [e for e in events if e["event"] in LINES])
        self._parts.set(
            axis_name("y", self._event_axis),
            range=[len(self._runs) - 0.5, -0.5],
            fixedrange=True,
            tickvals=[len(self._runs) / 2 - 0.5],
            ticktext=["events"],
            showgrid=False,
        )

    def _add_event_lines(self, run_number: int, events: Sequence[Data]) -> None:
        if events:
            self._add(
                {key: [x for e in events for x in (e[key], e[key], None)] for key in X_TITLES},
                self._overlay,
                run_number,
                y=[0, 1, None] * len(events),
                mode="lines",
                line={"width": 1, "dash": "dot"},
                opacity=0.5,
                hoverinfo="skip",
                meta={"lines": [event["event"] for event in events]},
            )

    def finish(self) -> go.Figure:
        """Add the legend of the runs and the buttons that change the axes."""
        if len(self._runs) > 1:
            for number, run in enumerate(self._runs):
                self._add_key(label(run["name"]), run_colour(number), legendgroup=f"run {number}")
        legend = {"orientation": "h", "x": 0, "y": 1 + 40 / self._height, "yanchor": "bottom"}
        last = axis_name("x", self._num_charts)
        self._parts.set(last, title={"text": X_TITLES[self._x], "standoff": 4})
        return self._parts.build(
            height=self._height + _MARGIN["t"] + _MARGIN["b"],
            margin=_MARGIN,
            hovermode="x unified",
            hoverlabel={"namelength": 40},
            legend=legend,
            shapes=self._phases(self._x),
            updatemenus=self._buttons(),
        )

    def _buttons(self) -> list[dict[str, Any]]:
        charts = range(1, self._num_charts + 1)
        ys = [axis_name("y", number) for number in charts]
        xs = [axis_name("x", number) for number in (*charts, *self._event_axes)]
        over = [
            {"label": f"over {title}", "method": "update", "args": self._switch(x)}
            for x, title in X_TITLES.items()
        ]
        linear_y = _types("linear", ys)
        for key in self._linear:
            linear_y.pop(key.replace(".range", ".autorange"))
        log_x = _toggle("log x", _types("log", xs), _types("linear", xs))
        log_y = _toggle("log y", _types("log", ys), {**linear_y, **self._linear})
        active = list(X_TITLES).index(self._x)
        place = {**BUTTONS, "type": "buttons", "direction": "right", "xanchor": "left", "x": 0}
        place["y"] = 1 + 72 / self._height
        return [
            {**place, "buttons": buttons, "active": pressed, "pad": {"t": 0, "b": 0, "l": left}}
            for left, pressed, buttons in (
                (0, active, over),
                (236, -1, [log_x]),
                (300, -1, [log_y]),
            )
        ]

    def _switch(self, x: str) -> list[Any]:
        """Build plotly's arguments for redrawing everything over tokens or iterations."""
        title = f"{axis_name('x', self._num_charts)}.title.text"
        layout = {"shapes": self._phases(x), "xaxis.autorange": True, title: X_TITLES[x]}
        return [{"x": [xs[x] for xs in self._xs]}, layout]

    def _add(self, xs: Data, number: int, run_number: int, **values: Any) -> None:
        """Add a trace of a run on a chart's axes."""
        colour = run_colour(run_number)
        if "marker" in values:
            values["marker"] |= {
                "color": colour,
                "line": {**values["marker"]["line"], "color": colour},
            }
        else:
            values["line"] |= {"color": colour}
        self._xs.append({key: xs[key] for key in X_TITLES})
        self._parts.traces.append(
            go.Scatter(
                x=xs[self._x],
                xaxis="x" if number == self._overlay else f"x{number}",
                yaxis=f"y{number}",
                legendgroup=f"run {run_number}",
                showlegend=False,
                **values,
            )
        )

    def _add_key(self, name: str, colour: str, dash: str = "solid", **values: Any) -> None:
        """Add a legend entry without points."""
        self._xs.append({key: [None] for key in X_TITLES})
        line = {"color": colour, "dash": dash}
        point: dict[str, Any] = {"x": [None], "y": [None], "mode": "lines", "hoverinfo": "skip"}
        self._parts.traces.append(go.Scatter(**point, name=name, line=line, **values))

    def _add_dash_legend(self, number: int, labels: Sequence[str], top: float) -> None:
        legend = f"legend{number + 1}"
        for dash, each in enumerate(labels[:_MAX_LEGEND]):
            self._add_key(label(each), QUIET, DASHES[dash % len(DASHES)], legend=legend)
        place = {"orientation": "h", "x": 0, "xanchor": "left", "y": top, "yanchor": "bottom"}
        still = {"itemclick": False, "itemdoubleclick": False, "bgcolor": "rgba(0,0,0,0)"}
        self._parts.set(legend, font={"size": 11}, **place, **still)

    def _phases(self, x: str) -> list[dict[str, Any]]:
        """Shade every second phase of the first run that has several, and label all."""
        run = next((run for run in self._runs if len(run["phases"]) > 1), None)
        if run is None:
            return []
        ends = [curve[x][-1] for curve in run["curves"] if curve[x][-1] is not None]
        borders = [phase[x] for phase in run["phases"]] + [max(ends, default=None)]
        shapes = []
        for number, phase in enumerate(run["phases"]):
            start, end = borders[number], borders[number + 1]
            if start is None or end is None or end <= start:
                continue
            text = {"text": label(phase["name"]), "textposition": "top left"}
            shapes.append(
                {
                    "type": "rect",
                    "layer": "below",
                    "line": {"width": 0},
                    "fillcolor": f"rgba(138,147,166,{0.14 * (number % 2)})",
                    "x0": start,
                    "x1": end,
                    "y0": 0,
                    "y1": 1,
                    "yref": "paper",
                    "label": {**text, "font": {"size": 11, "color": QUIET}},
                }
            )
        return shapes


def _types(kind: str, axes: Sequence[str]) -> dict[str, Any]:
    """Build the attributes that make axes linear or logarithmic and autoranged."""
    keys = {"type": kind, "autorange": True}
    return {f"{axis}.{key}": value for axis in axes for key, value in keys.items()}


def _toggle(name: str, on: Data, off: Data) -> dict[str, Any]:
    return {"label": name, "method": "relayout", "args": [on], "args2": [off]}


def _labels_of(chart: Data, runs: Sequence[Data]) -> list[str]:
    """List the labels of a chart's curves over all runs; the index selects the dash style."""
    curves = [curve for run in runs for curve in run["curves"]]
    return list(dict.fromkeys(each["label"] for each in curves if each["chart"] == chart["key"]))


def cut_of(values: Sequence[float]) -> float | None:
    """Choose where an axis ends, so that the highest values do not flatten the rest.

    Returns:
        The largest of the lowest 95 %, if the highest lies far above it; else None.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    lowest, highest = ordered[0], ordered[-1]
    most = ordered[math.ceil(0.95 * (len(ordered) - 1))]
    return most if most > lowest and highest - most > 0.3 * (most - lowest) else None
