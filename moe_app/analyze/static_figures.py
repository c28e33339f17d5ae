"""Draws charts with matplotlib, as PNG and SVG in the papers' layout."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_app.analyze.chart import HEAT_COLOURS, Flow, Panel, PanelGrid
from moe_app.analyze.tables import write_file

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6270",
    "svg.fonttype": "none",
    "svg.hashsalt": "routing",
    "axes.grid": False,
}
_DPI = 110
_MAX_TICKS = 8
_MARKED = 16
"""Points up to which a line shows each."""
_THIN = {"linewidth": 1.0}
_NODE_WIDTH, _NODE_GAP = 0.06, 0.012
_LABELLED = 0.006
"""Height of a box, with its gap, into which a line of text fits."""


def draw_static(directory: Path, figures: Sequence[PanelGrid | Flow]) -> None:
    """Write NAME.png and NAME.svg of each figure.

    Raises:
        DataError: they cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        for each in figures:
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if isinstance(each, Flow):
                _draw_flow(figure, each)
            else:
                _draw_chart(figure, each)
            for suffix, options in (("png", {"dpi": _DPI}), ("svg", {"metadata": {"Date": None}})):
                content = io.BytesIO()
                figure.savefig(content, format=suffix, **options)
                figure.set_layout_engine("none")  # what was found once is kept
                data = content.getvalue()
                if suffix == "svg":
                    lines = [line.rstrip() for line in data.decode("utf-8").splitlines()]
                    data = ("\n".join(lines) + "\n").encode("utf-8")
                write_file(directory / f"{each.name}.{suffix}", data)


def _draw_chart(figure: Any, chart: PanelGrid) -> None:
    num_rows, num_columns = len(chart.rows), max(map(len, chart.rows))
    width, height = chart.panel_size
    figure.set_size_inches(max(5.0, width * num_columns), height * num_rows + 0.7)
    figure.suptitle(_plain(chart.title), fontsize=11)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    seen: dict[str, Any] = {}
    image = None
    for row, panels in enumerate(chart.rows):
        for column in range(num_columns):
            axis = axes[row, column]
            if column < len(panels):
                image = _draw_panel(axis, panels[column])
                for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                    seen.setdefault(name, handle)
            else:
                axis.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes[:, -1].tolist(), shrink=0.8, pad=0.02)
    if len(seen) > 1:
        figure.legend(
            list(seen.values()),
            [_plain(name) for name in seen],
            loc="outside right center",
            title=chart.legend or None,
            ncols=1 + (len(seen) - 1) // 20,
            frameon=False,
        )


def _draw_panel(axis: Any, panel: Panel) -> Any:
    """Draw one pair of axes; return what a colour bar is made from, if it is a heat map."""
    image = None
    if panel.heat is not None:
        image = _draw_heat(axis, panel)
    else:
        _draw_series(axis, panel)
    for level in panel.levels:
        line = axis.axvline if level.is_vertical else axis.axhline
        line(
            level.value,
            color=level.colour,
            linestyle="--",
            linewidth=1,
            label=level.name or None,
            zorder=3,
        )
    if panel.y_top is not None:
        axis.set_ylim(0, panel.y_top)
    if panel.ticks:
        step = -(-len(panel.ticks) // _MAX_TICKS)
        kept = panel.ticks[::-1][::step][::-1]
        axis.set_xticks([at for at, _ in kept], [name for _, name in kept])
    if panel.is_count:
        axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_title(_plain(panel.title))
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    return image


def _draw_series(axis: Any, panel: Panel) -> None:
    for line in panel.lines:
        style = {"marker": "o", "ms": 3, "linewidth": 1.3} if len(line.x) <= _MARKED else _THIN
        name = line.name if line.is_named else "_nolegend_"
        axis.plot(line.x, line.y, color=line.colour, label=name, **style)
    count = max(1, len(panel.bars))
    for number, bars in enumerate(panel.bars):
        places = np.arange(len(bars.x)) if panel.is_ordered else np.asarray(bars.x, dtype=float)
        unit = 1.0 if len(places) < 2 else float(np.diff(places).min())
        width = 0.85 * unit / count
        shift = (number - (count - 1) / 2) * width
        axis.bar(places + shift, bars.y, width=width, color=bars.colour, label=bars.name)
        if panel.is_ordered:
            axis.set_xticks(np.arange(len(bars.x)), list(bars.x))


def _draw_heat(axis: Any, panel: Panel) -> Any:
    """Draw a heat map; return what a colour bar is made from."""
    from matplotlib.colors import LinearSegmentedColormap

    heat = panel.heat
    assert heat is not None
    scale = LinearSegmentedColormap.from_list("routing", list(HEAT_COLOURS))
    colours = scale.with_extremes(bad="#e4e7ed")
    image = axis.imshow(
        np.ma.masked_invalid(heat.values), cmap=colours, vmin=heat.least, vmax=heat.most
    )
    axis.set_xticks(range(len(heat.columns)), heat.columns, rotation=90, fontsize=7)
    axis.set_yticks(range(len(heat.rows)), heat.rows, fontsize=7)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
    return image


def _draw_flow(figure: Any, flow: Flow) -> None:
    figure.set_size_inches(3.0 * len(flow.columns) + 1.5, 6.5)
    figure.suptitle(_plain(flow.title), fontsize=11)
    axis = figure.subplots()
    axis.set_axis_off()
    total = sum(value for source, _, value in flow.links if flow.nodes[source].column == 0) or 1.0
    boxes = _place_nodes(flow, total)
    left = [box[1] for box in boxes]  # where the next link begins
    right = list(left)
    for source, target, value in sorted(flow.links):
        height = value / total
        begin, end = (boxes[source][0] + _NODE_WIDTH, boxes[target][0])
        _draw_link(
            axis, (begin, right[source]), (end, left[target]), height, flow.nodes[source].colour
        )
        right[source] -= height
        left[target] -= height
    for node, (x, top, height) in zip(flow.nodes, boxes, strict=True):
        axis.fill_between([x, x + _NODE_WIDTH], top - height, top, color=node.colour, linewidth=0)
        if height > _LABELLED:
            axis.text(
                x + _NODE_WIDTH * 1.15, top - height / 2, _plain(node.name), va="center", fontsize=7
            )
    for column, name in enumerate(flow.columns):
        axis.text(column + _NODE_WIDTH / 2, 1.03, _plain(name), ha="center", fontsize=9)
    axis.set_xlim(-0.05, len(flow.columns) - 1 + 0.45)
    axis.set_ylim(min(top - height for _, top, height in boxes) - 0.02, 1.08)


def _place_nodes(flow: Flow, total: float) -> list[tuple[float, float, float]]:
    """Return left end, top and height of each node, those of a column below one another."""
    tops = dict.fromkeys(range(len(flow.columns)), 1.0)
    boxes = []
    for index, node in enumerate(flow.nodes):
        came = sum(value for _, target, value in flow.links if target == index)
        went = sum(value for source, _, value in flow.links if source == index)
        height = max(came, went) / total
        boxes.append((float(node.column), tops[node.column], height))
        tops[node.column] -= height + _NODE_GAP
    return boxes


def _draw_link(
    axis: Any, begin: tuple[float, float], end: tuple[float, float], height: float, colour: str
) -> None:
    at = np.linspace(0, 1, 30)
    ease = 3 * at**2 - 2 * at**3
    x = begin[0] + (end[0] - begin[0]) * at
    y = begin[1] + (end[1] - begin[1]) * ease
    axis.fill_between(x, y - height, y, color=colour, alpha=0.28, linewidth=0)


def _plain(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
