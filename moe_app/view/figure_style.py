"""Holds what all figures of the HTML page share: colours, themes, axis placement, escaping."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

Data = Mapping[str, Any]
"""JSON values of `page_data`, or a part of them."""

RUN_COLOURS = ("#4c6ef5", "#e64980", "#0c9eb0", "#c98500", "#8a5cf6", "#379a45")
"""Legible on both themes."""
QUIET = "#8a8f9a"
"""Colour of what belongs to no run, legible on both themes."""
TEMPLATES: Mapping[str, Any] = {
    name: {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 12},
            "hoverlabel": {"bgcolor": page, "bordercolor": rule, "font": {"color": ink}},
            "xaxis": {"gridcolor": grid, "linecolor": rule, "zeroline": False},
            "yaxis": {"gridcolor": grid, "linecolor": rule, "zeroline": False},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": rule, "activecolor": ink},
        }
    }
    for name, page, ink, grid, rule in (
        ("light", "#ffffff", "#1c2230", "#e7eaf0", "#a9b0be"),
        ("dark", "#14171d", "#d6dae3", "#272d38", "#596273"),
    )
}
"""The themes of the page."""
BUTTONS: Mapping[str, Any] = {
    "bgcolor": "#eef0f5",
    "bordercolor": "#c5cad5",
    "font": {"color": "#1c2230", "size": 11},
    "pad": {"t": 0, "b": 0},
    "yanchor": "bottom",
}
"""Style of buttons and menus; plotly marks the active one with a light colour in any theme."""

_MAX_LETTERS = 60


def run_colour(number: int) -> str:
    """Return the colour of run `number`, counted from 0."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def label(text: str) -> str:
    """Escape a run's text for plotly, which renders some HTML in labels, including links."""
    cut = text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 1]}…"
    return html.escape(cut, quote=False)


def axis_name(letter: str, number: int) -> str:
    """Return the layout's name of an axis; the first has no number: `xaxis`, `xaxis2`."""
    return f"{letter}axis{number if number > 1 else ''}"


def stack(heights: Sequence[int], gaps: Sequence[int]) -> tuple[list[tuple[float, float]], int]:
    """Stack axes vertically.

    Args:
        heights: of the axes in pixels, from the top.
        gaps: below each of them but the last.

    Returns:
        Bottom and top of each, as fractions of the total height; and the total in pixels.
    """
    total = sum(heights) + sum(gaps)
    domains, top = [], total
    for height, gap in zip(heights, [*gaps, 0], strict=True):
        domains.append(((top - height) / total, top / total))
        top -= height + gap
    return domains, total


class FigureParts:
    """Collects traces and layout; plotly validates them once, in `build`."""

    def __init__(self) -> None:
        self.traces: list[Any] = []
        self._layout: dict[str, dict[str, Any]] = {}
        self._titles: list[dict[str, Any]] = []

    def set(self, key: str, **values: Any) -> None:
        """Set attributes of one layout key."""
        self._layout.setdefault(key, {}).update(values)

    def top(self, axis: str) -> float:
        """Return the upper end of a y axis as a fraction of the figure's height."""
        return float(self._layout[axis]["domain"][1])

    def add_title(self, text: str, top: float, *, shift: int = 4) -> None:
        """Add a title above axes that end at `top`, a fraction of the figure's height."""
        place = {"x": 0, "y": top, "xref": "paper", "yref": "paper", "yshift": shift}
        anchor = {"xanchor": "left", "yanchor": "bottom", "showarrow": False}
        self._titles.append({"text": text, "font": {"size": 13}, **place, **anchor})

    def build(self, **layout: Any) -> go.Figure:
        """Build the figure, with further layout attributes.

        Raises:
            ValueError: plotly rejects an attribute or value; a bug of the caller.
        """
        everything = {**self._layout, "annotations": self._titles, **layout}
        return go.Figure(data=self.traces, layout=everything)
