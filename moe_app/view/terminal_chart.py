"""Curves and heat strips of characters: braille, or ASCII where the terminal knows no other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from megatron.trainer.records.history import thin

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a braille character, by row and column."""
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:+#@"
_SHADE_BORDERS = (0.0, 0.5, 1.5, 3.0)
_CLIPPED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points to join, in order; a value that is not finite is a gap."""

    xs: Sequence[float]
    """Where they are, rising."""
    ys: Sequence[float]
    """How high."""
    style: str
    """A colour that rich knows."""


class Canvas:
    """Dots on a grid of characters, each of the style that came last.

    Args:
        columns: characters in a row.
        rows: rows of characters.
        ascii_only: draw a dot a character, instead of 2 x 4 as braille.
    """

    def __init__(self, columns: int, rows: int, *, ascii_only: bool) -> None:
        self._ascii_only = ascii_only
        self._bits = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]
        across, down = (1, 1) if ascii_only else (2, 4)
        self.width, self.height = columns * across, rows * down
        """Dots."""

    def dot(self, x: int, y: int, style: str) -> None:
        """Set a dot; `y` counts from the top."""
        across, down = (1, 1) if self._ascii_only else (2, 4)
        column, row = x // across, y // down
        self._bits[row][column] |= _DOTS[y % down][x % across]
        self._styles[row][column] = style

    def line(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        """Join two dots."""
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for step in range(steps + 1):
            x = start[0] + (end[0] - start[0]) * step / steps
            y = start[1] + (end[1] - start[1]) * step / steps
            self.dot(round(x), round(y), style)

    def lines(self) -> list[Text]:
        """The rows."""
        drawn = []
        for bits, styles in zip(self._bits, self._styles, strict=True):
            line = Text()
            for bit, style in zip(bits, styles, strict=True):
                if self._ascii_only or not bit:
                    line.append("*" if bit else " ", style)
                else:
                    line.append(chr(_BRAILLE + bit), style)
            drawn.append(line)
        return drawn


def draw_curves(
    curves: Sequence[Curve], *, columns: int, rows: int, x_unit: str, ascii_only: bool
) -> list[Text]:
    """A chart of exactly `rows` lines, the last one for the x axis.

    The y axis is as high as all but the highest 5 % of the points need it, so that the fall at the
    beginning of a training does not flatten the rest; what is above runs along the top.

    Args:
        curves: what to draw; all on the same axes.
        columns: width of the chart with its labels.
        rows: height of the chart with its labels.
        x_unit: what x counts.
        ascii_only: draw without braille.
    """
    points = [(x, y) for each in curves for x, y in _points(each)]
    if not points:
        return [Text("no loss yet", "dim"), *(Text() for _ in range(rows - 1))]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    heights = sorted(y for _, y in points)
    bottom, top = heights[0], heights[math.ceil((1 - _CLIPPED_SHARE) * (len(heights) - 1))]
    if top == bottom:
        bottom, top = bottom - 0.5, top + 0.5
    labels = _y_labels(bottom, top, rows - 1)
    margin = max(len(label) for label in labels)
    canvas = Canvas(columns - margin - 2, rows - 1, ascii_only=ascii_only)
    for each in curves:
        _draw_curve(canvas, each, (left, right), (bottom, top))
    wall = "|" if ascii_only else "│"
    lines = []
    for label, line in zip(labels, canvas.lines(), strict=True):
        lines.append(Text.assemble((f"{label:>{margin}} {wall}", "dim"), line))
    start, end = short_number(left), f"{short_number(right)} {x_unit}"
    axis = f"{'':{margin + 2}}{start}{end:>{max(0, columns - margin - 2 - len(start))}}"
    return [*lines, Text(axis, "dim")]


def _points(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.xs, curve.ys, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _draw_curve(
    canvas: Canvas, curve: Curve, across: tuple[float, float], down: tuple[float, float]
) -> None:
    left, right = across
    bottom, top = down
    before: tuple[int, int] | None = None
    for index in thin(curve.ys, 6 * canvas.width):
        x, y = curve.xs[index], curve.ys[index]
        if not (math.isfinite(x) and math.isfinite(y)):
            before = None
            continue
        share = (x - left) / (right - left) if right > left else 0.5
        height = min(1.0, (y - bottom) / (top - bottom))
        here = (round(share * (canvas.width - 1)), round((1 - height) * (canvas.height - 1)))
        canvas.line(before or here, here, curve.style)
        before = here


def _y_labels(bottom: float, top: float, rows: int) -> list[str]:
    """Numbers at the top, in the middle and at the bottom, with the digits that tell them apart."""
    digits = max(0, 2 - math.floor(math.log10(top - bottom)))
    labels = [""] * rows
    for row in {0, (rows - 1) // 2, rows - 1}:
        value = top - (top - bottom) * row / max(1, rows - 1)
        labels[row] = f"{value:.{min(digits, 6)}f}" if abs(value) < 1e6 else f"{value:.3g}"
    return labels


def sparkline(values: Sequence[float], columns: int, *, ascii_only: bool) -> str:
    """A row of bars, each the mean of its stretch of `values`, from the lowest to the highest."""
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
    """A cell for each load: 1 is an even share, less is blue or light, more is red or heavy."""
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
    """What the shades of a strip without colours mean."""
    shades = _ASCII_SHADES if ascii_only else _SHADES
    told = ("none", *(f"<{border:g}" for border in _SHADE_BORDERS[1:]), "more")
    return " ".join(f"{shade} {text}" for shade, text in zip(shades, told, strict=True))


def load_colour(load: float) -> str:
    """From blue (no token) over grey (an even share) to red (four times as many, or more)."""
    blue, grey, red = (0x2C, 0x6F, 0xDB), (0x8A, 0x8A, 0x8A), (0xE0, 0x2F, 0x2F)
    if load < 1:
        share, end = 1 - max(0.0, load), blue
    else:
        share, end = min(1.0, math.log2(load) / 2), red
    mixed = (round(a + (b - a) * share) for a, b in zip(grey, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def group_rows(rows: Sequence[Sequence[float]], count: int) -> list[tuple[int, int, list[float]]]:
    """At most `count` rows: neighbours become one, of the highest values.

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
    """Three digits and a unit: 950, 1.23k, 45.6M, 7.89G, 1.2T."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
