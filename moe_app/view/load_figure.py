"""Draws a run's expert loads as heat maps: of one record, of a layer over time, of all layers."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from moe_app.view.figure_style import BUTTONS, Data, FigureParts, axis_name, stack

_NEUTRAL, _BLUE, _RED = "#e4e7ed", "#2c6fdb", "#e02f2f"
_MIXED = ((0.354, "#e3b9be"), (0.5, "#e28b8e"))
LOAD_SCALE = ((0, _BLUE), (0.25, _NEUTRAL), *_MIXED, (1, _RED))
"""Colours of 0 to 4 times an even share: blue below 1, red above, by the logarithm."""
_COUNTS = {
    "coloraxis": None,
    "colorscale": ((0, _NEUTRAL), (1, _BLUE)),
    "zmin": 0,
    "showscale": False,
}
_MARGIN = {"l": 64, "r": 84, "t": 56, "b": 48}
_SLIDER_GAP, _GAP = 150, 84


def load_figure(run: Data) -> go.Figure:
    """Draw all maps of a run; a slider picks the record and a menu the layer."""
    heights, gaps = [], []
    for load in run["loads"]:
        layers, experts = len(load["rows"][0]), len(load["rows"][0][0])
        heights += [_map_height(layers), _map_height(experts)]
        gaps += [_SLIDER_GAP, _GAP]
    for layers in run["layers"]:
        heights.append(_map_height(len(layers["columns"][0])))
        gaps.append(_GAP)
    domains, height = stack(heights, gaps[:-1])
    parts = FigureParts()
    sliders, menus = [], []
    for load in run["loads"]:
        sliders.append(_add_record_map(parts, load, domains.pop(0), height))
        menus.append(_add_layer_map(parts, load, domains.pop(0), height))
    for layers in run["layers"]:
        _add_over_time(parts, layers, domains.pop(0))
    bar = {"thickness": 10, "len": 150, "lenmode": "pixels", "y": 1, "yanchor": "top"}
    bar |= {"tickvals": (0, 1, 2, 4), "ticktext": ("none", "even", "2 x", "4 x")}
    scale = {"cmin": 0, "cmax": 4, "colorscale": LOAD_SCALE, "colorbar": bar}
    return parts.build(
        height=height + _MARGIN["t"] + _MARGIN["b"],
        margin=_MARGIN,
        coloraxis=scale,
        hovermode="closest",
        sliders=sliders,
        updatemenus=menus,
    )


def _add_record_map(
    parts: FigureParts, load: Data, domain: tuple[float, float], height: int
) -> dict[str, Any]:
    """Add the loads of all experts in one record; returns the slider that picks it."""
    trace = len(parts.traces)
    _add_map(
        parts,
        load["rows"][-1],
        domain,
        title=f"<b>{load['title']}</b>, all layers; {len(load['rows'])} of"
        f" {load['records']:,} records",
        axes=("expert", "layer"),
        hover="layer %{y}, expert %{x}: %{z:.4~f}",
        y0=1,
        meta={"map": "record", "title": load["title"]},
    )
    steps = [
        {"label": f"{at:,}", "method": "restyle", "args": [{"z": [rows]}, [trace]]}
        for at, rows in zip(load["iteration"], load["rows"], strict=True)
    ]
    return {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "iteration ", "xanchor": "left"},
        "steps": steps,
        "y": domain[0] - 36 / height,
        "yanchor": "top",
        "pad": {"t": 0, "b": 0},
        "ticklen": 3,
        "font": {"size": 10},
    }


def _add_layer_map(
    parts: FigureParts, load: Data, domain: tuple[float, float], height: int
) -> dict[str, Any]:
    """Add the loads of one layer's experts in all records; returns the menu that picks it."""
    trace = len(parts.traces)
    layers = range(len(load["rows"][0]))
    over_time = [_transposed([rows[layer] for rows in load["rows"]]) for layer in layers]
    _add_map(
        parts,
        over_time[0],
        domain,
        title=f"<b>{load['title']}</b>, one layer over time",
        axes=("iteration", "expert"),
        hover="expert %{y}, iteration %{x:,}: %{z:.4~f}",
        x=load["iteration"],
        meta={"map": "layer", "title": load["title"]},
    )
    buttons = [
        {"label": f"layer {layer + 1}", "method": "restyle", "args": [{"z": [rows]}, [trace]]}
        for layer, rows in enumerate(over_time)
    ]
    place = {"x": 1, "xanchor": "right", "y": domain[1] + 2 / height}
    return {**BUTTONS, **place, "buttons": buttons, "active": 0}


def _add_over_time(parts: FigureParts, layers: Data, domain: tuple[float, float]) -> None:
    """Add a per-layer quantity over time."""
    _add_map(
        parts,
        _transposed(layers["columns"]),
        domain,
        title=f"<b>{layers['title']}</b>",
        axes=("iteration", "layer"),
        hover="layer %{y}, up to iteration %{x:,}: %{z:.4~f}",
        x=layers["iteration"],
        y0=1,
        meta={"map": "layers", "title": layers["title"]},
        **(_COUNTS if layers["is_count"] else {}),
    )


def _add_map(
    parts: FigureParts,
    rows: Sequence[Sequence[float | None]],
    domain: tuple[float, float],
    *,
    title: str,
    axes: tuple[str, str],
    hover: str,
    **values: Any,
) -> None:
    """Add a heat map [y][x], its first row at the top, on axes of its own."""
    number = len(parts.traces) + 1
    values = {"coloraxis": "coloraxis", **values}
    parts.traces.append(
        go.Heatmap(
            z=rows,
            xaxis=f"x{number}",
            yaxis=f"y{number}",
            hovertemplate=f"{hover}<extra></extra>",
            **values,
        )
    )
    parts.set(
        axis_name("x", number),
        anchor=f"y{number}",
        showgrid=False,
        title={"text": axes[0], "standoff": 4},
    )
    parts.set(
        axis_name("y", number),
        domain=domain,
        anchor=f"x{number}",
        autorange="reversed",
        showgrid=False,
        title={"text": axes[1]},
        dtick=max(1, math.ceil(len(rows) / 8)),
        tick0=values.get("y0", 0),
    )
    parts.add_title(title, domain[1])


def _map_height(rows: int) -> int:
    """Return a map's height in pixels: at most 24 per row, about 320 in all if there are many."""
    return max(48, max(2, min(24, 320 // rows)) * rows)


def _transposed(columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns, strict=True)]
