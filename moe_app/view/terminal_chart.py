"""Draws curves (with plotext), sparklines and heat strips; in ASCII if needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotext
from rich.text import Text

from megatron.trainer.records.history import thin

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:+#@"
_SHADE_BORDERS = (0.0, 0.5, 1.5, 3.0)
_CLIPPED_SHARE = 0.05
_MAX_POINTS = 1500
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
"""In the order of their numbers in a terminal."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Describes a curve; a non-finite value is a gap."""

    xs: Sequence[float]
    """Where they are, rising."""
    ys: Sequence[float]
    """How high."""
    style: str
    """One of the eight colours of a terminal."""


def draw_curves(
    curves: Sequence[Curve], *, columns: int, rows: int, x_unit: str, ascii_only: bool
) -> list[Text]:
    """Draw a chart of exactly `rows` lines, the last one for the x axis.

    The y axis is as high as all but the highest 5 % of the points need it, so that the fall at the
    beginning of a training does not flatten the rest; what is above runs along the top.

    Args:
        curves: what to draw; all on the same axes.
        columns: width of the chart with its labels.
        rows: height of the chart with its labels.
        x_unit: what x counts.
        ascii_only: draw without braille.
    """
    points = [point for each in curves for segment in _segments(each) for point in segment]
    if not points:
        return [Text("no loss yet", "dim"), *(Text() for _ in range(rows - 1))]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    heights = sorted(y for _, y in points)
    bottom, top = heights[0], heights[math.ceil((1 - _CLIPPED_SHARE) * (len(heights) - 1))]
    if top == bottom:
        bottom, top = bottom - 0.5, top + 0.5
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(columns, rows)
    plotext.theme("clear")
    plotext.xaxes(False, False)
    plotext.yaxes(True, False)
    plotext.xlim(left, right if right > left else left + 1)
    plotext.ylim(bottom, top)
    plotext.xticks([left, right], [short_number(left), f"{short_number(right)} {x_unit}"])
    ticks = [bottom, (bottom + top) / 2, top]
    plotext.yticks(ticks, _labels(ticks))
    for each in curves:
        for segment in _segments(each):
            plotext.plot(
                [x for x, _ in segment],
                [min(y, top) for _, y in segment],
                marker="*" if ascii_only else "braille",
                color=_COLOURS.index(each.style),
            )
    drawn = plotext.build()
    if ascii_only:
        drawn = drawn.replace("│", "|").replace("┤", "|")
    return [Text.from_ansi(line) for line in drawn.splitlines()]


def _segments(curve: Curve) -> list[list[tuple[float, float]]]:
    """Split a curve at its gaps, thinned to `_MAX_POINTS`."""
    segments: list[list[tuple[float, float]]] = [[]]
    for index in thin(curve.ys, _MAX_POINTS):
        x, y = curve.xs[index], curve.ys[index]
        if math.isfinite(x) and math.isfinite(y):
            segments[-1].append((x, y))
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _labels(values: Sequence[float]) -> list[str]:
    """Format axis values in ascending order with enough digits to distinguish them."""
    digits = min(6, max(0, 2 - math.floor(math.log10(values[-1] - values[0]))))
    return [f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}" for value in values]


def sparkline(values: Sequence[float], columns: int, *, ascii_only: bool) -> str:
    """Draw a row of bars, each the mean of its interval, scaled from lowest to highest."""
    bars = _ASCII_BARS if ascii_only else _BARS
    means = []
    count = min(columns, len(values))
    for number in range(count):
        part = values[number * len(values) // count : (number + 1) * len(values) // count]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(
        bars[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means
    )


def heat_strip(
    loads: Sequence[float], *, cell_columns: int, in_colour: bool, ascii_only: bool
) -> Text:
    """Draw a cell per load: 1 is an even share, less is blue or light, more is red or dark."""
    shades = _ASCII_SHADES if ascii_only else _SHADES
    strip = Text()
    for load in loads:
        if in_colour and not ascii_only:
            strip.append("█" * cell_columns, load_colour(load))
        else:
            shade = shades[sum(load > border for border in _SHADE_BORDERS)]
            strip.append(shade * cell_columns)
    return strip


def shade_legend(*, ascii_only: bool) -> str:
    """Explain the shades of a strip without colours."""
    shades = _ASCII_SHADES if ascii_only else _SHADES
    told = ("none", *(f"<{border:g}" for border in _SHADE_BORDERS[1:]), "more")
    return " ".join(f"{shade} {text}" for shade, text in zip(shades, told, strict=True))


def load_colour(load: float) -> str:
    """Map a load to a colour: blue (none), grey (an even share), red (4 x or more)."""
    blue, grey, red = (0x2C, 0x6F, 0xDB), (0x8A, 0x8A, 0x8A), (0xE0, 0x2F, 0x2F)
    if load < 1:
        share, end = 1 - max(0.0, load), blue
    else:
        share, end = min(1.0, math.log2(load) / 2), red
    mixed = (round(a + (b - a) * share) for a, b in zip(grey, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def group_rows(rows: Sequence[Sequence[float]], count: int) -> list[tuple[int, int, list[float]]]:
    """Merge neighbouring rows into at most `count`, by their elementwise maximum.

    Returns:
        For each the numbers of its first and last row, from 1 on, and the values.
    """
    size = math.ceil(len(rows) / max(1, count))
    groups = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        highest = [max(column) for column in zip(*part, strict=True)]
        groups.append((start + 1, start + len(part), highest))
    return groups


def short_number(value: float) -> str:
    """Format with three digits and a unit: 950, 1.23k, 45.6M, 7.89G, 1.2T."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
