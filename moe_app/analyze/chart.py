"""Describes figures without a library: what is drawn both for papers and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PINK, CYAN, NAVY, YELLOW, PURPLE = "#F0539B", "#43C5E0", "#2E3168", "#F2B630", "#B11BE8"
GREY, PALE = "#8a8f9a", "#cfd3da"
DOMAIN_COLOURS = (PINK, CYAN, PURPLE, YELLOW, NAVY)
"""As OLMoE's figure 22 has them, in the order of its rows."""
VARIANT_COLOURS = {"input": PINK, "predicted": CYAN, "ground_truth": NAVY}
HEAT_COLOURS = ("#ffffff", PINK, "#4A0033")
"""Of OLMoE's figure 21: none, middle, most."""
_LAYER_STOPS = (PINK, CYAN, NAVY, YELLOW)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Holds a line, or bars of one colour."""

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    colour: str
    hover: Sequence[str] = ()
    """What to say of each point besides."""
    is_named: bool = True
    """The legend has it."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Describes a dashed line: what a random router gives, or a mean."""

    value: float
    name: str
    colour: str = GREY
    is_vertical: bool = False


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Holds a matrix whose rows and columns are experts."""

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    most: float
    least: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Describes one pair of axes: lines, bars or a heat map."""

    title: str = ""
    x_label: str = ""
    y_label: str = ""
    lines: Sequence[Series] = ()
    bars: Sequence[Series] = ()
    heat: Heat | None = None
    levels: Sequence[Level] = ()
    y_top: float | None = None
    """Upper end of the y axis; None fits."""
    ticks: Sequence[tuple[float, str]] = ()
    """Of the x axis; empty lets the library choose."""
    is_count: bool = False
    """The y axis counts."""
    is_ordered: bool = False
    """The x axis has names in the order given."""


@dataclass(frozen=True, kw_only=True)
class PanelGrid:
    """Describes a figure: a grid of panels under one legend."""

    name: str
    """Of its files, without suffix."""
    title: str
    about: str
    """What it shows, and what a random router would give."""
    rows: Sequence[Sequence[Panel]]
    legend: str = ""
    """Title of the legend."""
    panel_size: tuple[float, float] = (4.2, 3.2)
    """Width and height of a panel, inches."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Describes a box of a flow."""

    name: str
    column: int
    colour: str


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Describes how tokens go from column to column of boxes."""

    name: str
    title: str
    about: str
    columns: Sequence[str]
    nodes: Sequence[Node]
    links: Sequence[tuple[int, int, float]]
    """Source, target and tokens."""
    legend: str = field(default="")


def layer_colours(count: int) -> list[str]:
    """Return a colour per layer, from the first to the last along the paper's scale."""
    return [_between(_LAYER_STOPS, index / max(1, count - 1)) for index in range(count)]


def _between(stops: Sequence[str], place: float) -> str:
    """Mix the colours at `place`, from 0 to 1."""
    at = place * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    mixed = [
        round(a + (b - a) * (at - low))
        for a, b in zip(_parts(stops[low]), _parts(stops[low + 1]), strict=True)
    ]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _parts(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def top_of(values: Sequence[float], *, step: float = 10.0, most: float | None = None) -> float:
    """Return a round upper end for an axis of non-negative values; NaN is passed over."""
    known = [value for value in values if value == value]
    highest = max(known, default=0.0)
    top = step * max(1, int(np.ceil(highest * 1.08 / step)))
    return top if most is None else min(top, most)
