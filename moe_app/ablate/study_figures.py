"""Draws a study as the papers do: losses and accuracies in a row, over tokens and over FLOPs."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_app.ablate.studies_file import TASK, TRAIN, VALID, Study
from moe_app.ablate.sweep_tables import Trained

COLOURS = ("#F0539B", "#43C5E0", "#2E3168", "#F7A24A", "#53A66F", "#8A5CF6")
"""Of runs in their order; the first three are the papers'."""

_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6270",
    "axes.titlesize": 9,
    "axes.grid": False,
}
_DPI = 96
_WIDTH, _HEIGHT = 2.7, 2.2
_SETTLED = 0.2
"""Share of a curve's length, before which its losses may lie above the picture."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Holds the curve of a run over its seeds."""

    tokens: tuple[float, ...]
    """Where every seed has a value."""
    flops: tuple[float, ...]
    """Of training until there."""
    mean: tuple[float, ...]
    """Over seeds."""
    low: tuple[float, ...]
    """Lowest seed."""
    high: tuple[float, ...]
    """Highest seed."""


def band_of(runs: Sequence[Trained], metric: str) -> Band | None:
    """Return the curve of one run, trained under one or several seeds; None without values."""
    of_seed = [
        {point.tokens: point.value for point in run.curves[metric]}
        for run in runs
        if metric in run.curves
    ]
    if not of_seed:
        return None
    tokens = sorted(set.intersection(*(set(each) for each in of_seed)))
    values = [[each[at] for each in of_seed] for at in tokens]
    if not tokens:
        return None
    return Band(
        tokens=tuple(tokens),
        flops=tuple(runs[0].flops_at(at) for at in tokens),
        mean=tuple(statistics.fmean(each) for each in values),
        low=tuple(min(each) for each in values),
        high=tuple(max(each) for each in values),
    )


def panels_of(study: Study, runs: Sequence[Trained]) -> dict[str, dict[str, Band]]:
    """Return the curves of a study by metric and run: losses first, tasks last."""
    metrics = dict.fromkeys(
        metric for run in runs if run.run in study.runs for metric in run.curves
    )
    sets = [metric for metric in metrics if metric.startswith(f"{VALID} ")]
    tasks = [metric for metric in metrics if metric.startswith(f"{TASK} ")]
    order = [TRAIN, *(sets or [VALID]), *tasks]
    found: dict[str, dict[str, Band]] = {}
    for metric in order:
        bands = {
            name: band
            for name in study.runs
            if (band := band_of([each for each in runs if each.run == name], metric)) is not None
        }
        if bands:
            found[metric] = bands
    return found


def draw_study(study: Study, runs: Sequence[Trained]) -> bytes | None:
    """Draw a study; None if none of its runs has a curve.

    Returns:
        A PNG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(study, runs)
    if not panels:
        return None
    with rc_context(_STYLE):
        size = (_WIDTH * len(panels), 2 * _HEIGHT + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(panels), squeeze=False)
        for column, (metric, bands) in enumerate(panels.items()):
            for row, x_name in enumerate(("tokens", "flops")):
                _draw_panel(axes[row][column], study, bands, x_name)
                _set_top(axes[row][column], metric, bands)
            axes[0][column].set_title(panel_title(metric))
        for row, x_title in enumerate(("tokens", "training FLOPs")):
            for ax in axes[row]:
                ax.set_xlabel(x_title)
        handles: dict[str, Any] = {}
        for ax in axes[0]:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
        )
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return _in_few_colours(file.getvalue())


def _in_few_colours(png: bytes) -> bytes:
    """Return the image with a palette, which makes the file a third as large."""
    from PIL import Image  # matplotlib writes PNG with it

    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(
            256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        ).save(file, format="png", optimize=True)
    return file.getvalue()


def panel_title(metric: str) -> str:
    """Return the title of a panel."""
    kind, _, name = metric.partition(" ")
    plain = name.replace("$", r"\$")  # a dollar sign would begin a formula
    if kind == TASK:
        return f"{plain} (accuracy)"
    title = "training loss" if kind == TRAIN else "validation loss"
    return f"{title}, {plain}" if name else title


def _draw_panel(ax: Any, study: Study, bands: Mapping[str, Band], x_name: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for number, (name, label) in enumerate(study.runs.items()):
        if name not in bands:
            continue
        band = bands[name]
        colour = COLOURS[number % len(COLOURS)]
        x = band.tokens if x_name == "tokens" else band.flops
        mark = "o" if len(x) < 12 else None
        text = label.replace("$", r"\$")
        ax.plot(x, band.mean, color=colour, linewidth=1.2, label=text, marker=mark, markersize=2.5)
        ax.fill_between(x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _set_top(ax: Any, metric: str, bands: Mapping[str, Band]) -> None:
    """Leave the first steep part of losses above the picture."""
    if metric.startswith(TASK):
        return
    settled = [
        value
        for band in bands.values()
        for at, value in zip(band.tokens, band.high, strict=True)
        if at >= _SETTLED * band.tokens[-1]
    ]
    lowest = min(min(band.low) for band in bands.values())
    highest = max(settled)
    if math.isfinite(highest) and highest > lowest:
        margin = 0.05 * (highest - lowest)
        ax.set_ylim(lowest - margin, highest + margin)
