"""Draws charts with plotly, for the page."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_app.analyze.chart import HEAT_COLOURS, Flow, Panel, PanelGrid
from moe_app.view.figure_style import label

_SCALE = tuple(zip((0.0, 0.5, 1.0), HEAT_COLOURS, strict=True))


def draw_interactive(figure: PanelGrid | Flow) -> go.Figure:
    """Draw one figure."""
    return _draw_flow(figure) if isinstance(figure, Flow) else _draw_chart(figure)


def _draw_chart(chart: PanelGrid) -> go.Figure:
    num_rows, num_columns = len(chart.rows), max(map(len, chart.rows))
    titles = [
        label(panels[column].title) if column < len(panels) else ""
        for panels in chart.rows
        for column in range(num_columns)
    ]
    height = 90 + round(95 * chart.panel_size[1]) * num_rows
    drawn = make_subplots(
        rows=num_rows,
        cols=num_columns,
        subplot_titles=titles,
        horizontal_spacing=0.25 / num_columns if num_columns > 1 else 0,
        vertical_spacing=0.28 / num_rows if num_rows > 1 else 0,
    )
    seen: set[str] = set()
    for row, panels in enumerate(chart.rows, start=1):
        for column, panel in enumerate(panels, start=1):
            for trace in _traces(panel, seen):
                drawn.add_trace(trace, row=row, col=column)
            _set_axes(drawn, panel, row, column)
    drawn.update_layout(
        height=height,
        margin={"l": 60, "r": 30, "t": 50, "b": 50},
        legend={"title": {"text": label(chart.legend)}},
        coloraxis={"colorscale": _SCALE, **_range(chart), "colorbar": {"thickness": 10}},
        bargap=0.1,
    )
    drawn.update_annotations(font_size=12)
    return _without_template(drawn)


def _traces(panel: Panel, seen: set[str]) -> list[Any]:
    traces: list[Any] = []
    if panel.heat is not None:
        traces.append(
            go.Heatmap(
                z=[[None if np.isnan(v) else float(v) for v in row] for row in panel.heat.values],
                x=[f"{name} " for name in panel.heat.columns],
                y=[f"{name} " for name in panel.heat.rows],
                coloraxis="coloraxis",
                hovertemplate="%{y}and %{x}: %{z:.4~f}<extra></extra>",
            )
        )
    for kind, series in (("line", panel.lines), ("bar", panel.bars)):
        for each in series:
            shared = {
                "name": label(each.name),
                "x": list(each.x),
                "y": [None if value != value else float(value) for value in each.y],
                "legendgroup": label(each.name),
                "showlegend": each.is_named and each.name not in seen,
                "text": [label(text) for text in each.hover] or None,
                "textposition": "none" if kind == "bar" else None,
                "hovertemplate": f"{label(each.name)} %{{x}}: %{{y:.4~f}} %{{text}}<extra></extra>"
                if each.hover
                else f"{label(each.name)} %{{x}}: %{{y:.4~f}}<extra></extra>",
            }
            seen.add(each.name)
            if kind == "bar":
                traces.append(go.Bar(**shared, marker={"color": each.colour}))
            else:
                traces.append(
                    go.Scatter(**shared, mode="lines+markers", line={"color": each.colour})
                )
    return traces


def _set_axes(drawn: go.Figure, panel: Panel, row: int, column: int) -> None:
    x: dict[str, Any] = {"title": {"text": label(panel.x_label), "standoff": 4}}
    y: dict[str, Any] = {"title": {"text": label(panel.y_label), "standoff": 4}}
    if panel.ticks:
        x |= {
            "tickvals": [at for at, _ in panel.ticks],
            "ticktext": [label(name).replace("\n", "<br>") for _, name in panel.ticks],
        }
    if panel.is_ordered or panel.heat is not None:
        x["type"] = "category"
    if panel.heat is not None:
        y |= {"type": "category", "autorange": "reversed"}
    elif panel.y_top is not None:
        y["range"] = [0, panel.y_top]
        if panel.is_count:
            y["dtick"] = max(1, round(panel.y_top / 5))
    drawn.update_xaxes(**x, row=row, col=column)
    drawn.update_yaxes(**y, row=row, col=column)
    for level in panel.levels:
        add = drawn.add_vline if level.is_vertical else drawn.add_hline
        place = {"x": level.value} if level.is_vertical else {"y": level.value}
        add(**place, line={"color": level.colour, "dash": "dash", "width": 1}, row=row, col=column)


def _range(chart: PanelGrid) -> dict[str, float]:
    """Return the ends of the colours, the same for all heat maps of a figure."""
    heats = [panel.heat for panels in chart.rows for panel in panels if panel.heat is not None]
    if not heats:
        return {}
    return {"cmin": min(heat.least for heat in heats), "cmax": max(heat.most for heat in heats)}


def _draw_flow(flow: Flow) -> go.Figure:
    links = {
        "source": [source for source, _, _ in flow.links],
        "target": [target for _, target, _ in flow.links],
        "value": [value for _, _, value in flow.links],
        "color": [_faint(flow.nodes[source].colour) for source, _, _ in flow.links],
    }
    nodes = {
        "label": [label(node.name) for node in flow.nodes],
        "color": [node.colour for node in flow.nodes],
        "pad": 6,
        "thickness": 14,
    }
    drawn = go.Figure(go.Sankey(node=nodes, link=links, arrangement="snap"))
    drawn.update_layout(height=620, margin={"l": 20, "r": 20, "t": 30, "b": 20})
    return _without_template(drawn)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.3)"


def _without_template(drawn: go.Figure) -> go.Figure:
    """Return a figure without a template, which the page sets by theme."""
    drawn.update_layout(template=None)
    return drawn
