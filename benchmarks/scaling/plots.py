"""Plots the sweeps: medians as points, minimum and maximum of the rounds as bars."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.points import NATIVE, PEER
from megatron.trainer.hooks.plots import write_figure

_COLOURS = ("#2E3168", "#F0539B", "#43C5E0", "#E0A100", "#B11BE8", "#8A8A8A", "#4FA36B")
_MARKERS = ("o", "s", "^", "D")


def new_panels(width: float, height: float, number: int) -> tuple[Any, list[Any]]:
    """Make a figure with axes side by side, without a display and without top and right spines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def bars(
    axes: Any, places: Sequence[float], summaries: Sequence[Mapping[str, float]], **style: Any
) -> None:
    """Draw a line through the medians, with a bar from minimum to maximum."""
    middle = [each["median"] for each in summaries]
    below = [each["median"] - each["low"] for each in summaries]
    above = [each["high"] - each["median"] for each in summaries]
    axes.errorbar(places, middle, yerr=[below, above], capsize=3, markersize=5, **style)


def plot_points(sweep: str, found: Mapping[str, Any], path: Path) -> None:
    """Plot the time of a step over the varied size, and the peer's time over ours."""
    points = found["points"]
    has_peer = PEER in points[0]["implementations"]
    figure, panels = new_panels(10.0 if has_peer else 5.6, 3.9, 2 if has_peer else 1)
    places = [point["value"] for point in points]
    names = [name for name in (NATIVE, PEER) if name in points[0]["implementations"]]
    for index, name in enumerate(names):
        rows = [point["implementations"][name]["milliseconds"] for point in points]
        bars(panels[0], places, rows, color=_COLOURS[index], marker=_MARKERS[index], label=name)
    if sweep == "tokens":
        panels[0].set_yscale("log")
        _plain_log_ticks(panels[0])
    else:
        panels[0].set_ylim(bottom=0.0)
    panels[0].set_ylabel("milliseconds a step")
    panels[0].legend(frameon=False, loc="lower right" if sweep == "experts" else "upper left")
    if has_peer:
        ratios = [point["peer_time_over_native"] for point in points]
        bars(panels[1], places, ratios, color=_COLOURS[0], marker="o")
        panels[1].axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
        panels[1].set_ylabel("transformers' time / native's")
        panels[1].set_ylim(bottom=0.0)
    for axes in panels:
        if sweep == "layers":
            axes.set_xlim(left=0.0)
        else:
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [_tick(sweep, point) for point in points])
        axes.minorticks_off()
        axes.set_xlabel(_X_LABELS[sweep])
    figure.suptitle(textwrap.fill(_title(sweep, points), 60 * len(panels)), fontsize=9)
    write_figure(figure, path)


_X_LABELS = {
    "tokens": "tokens of a step",
    "experts": "experts a layer (top-k, width of an expert)",
    "layers": "layers",
}


def _tick(sweep: str, point: Mapping[str, Any]) -> str:
    if sweep == "experts":
        return f"{point['value']}\nk {point['topk']}\nf {point['ffn']}"
    return f"{point['value']:,}"


def _title(sweep: str, points: Sequence[Mapping[str, Any]]) -> str:
    first = points[0]
    size = f"{first['parameters'] / 1e6:.0f} M parameters, " if sweep != "layers" else ""
    tokens = f"{first['tokens']:,} tokens a step, " if sweep != "tokens" else ""
    return f"Training step on a CPU, fp32: {size}{tokens}bars from the lowest to the highest round"


def _plain_log_ticks(axes: Any) -> None:
    """Label log ticks as 100 and 2,000, not 10^2 and 2 x 10^3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_processes(found: Mapping[str, Any], path: Path) -> None:
    """Plot the speedup and the bytes sent over the number of processes."""
    figure, (speed, traffic) = new_panels(10.0, 4.0, 2)
    places = {number: place for place, number in enumerate(found["processes"])}
    layouts = found["layouts"].values()
    kinds = list(dict.fromkeys(row["kind"] for row in layouts if row["kind"]))
    for index, kind in enumerate(kinds):
        rows = [found["layouts"]["1"], *(row for row in layouts if row["kind"] == kind)]
        at = [places[row["processes"]] for row in rows]
        shift = index - (len(kinds) - 1) / 2  # keeps bars from overlapping
        bars(
            speed, [at[0], *(place + 0.05 * shift for place in at[1:])],
            [row["speedup"] for row in rows],
            color=_COLOURS[index], marker=_MARKERS[index % len(_MARKERS)], label=kind,
        )  # fmt: skip
        traffic.bar(
            [place + 0.2 * shift for place in at[1:]],
            [row["wire_bytes"] / 1e6 / row["processes"] for row in rows[1:]],
            width=0.18, color=_COLOURS[index],
        )  # fmt: skip
    _mark_cores(speed, places, found["machine"]["cpu_count"])
    speed.set_ylabel("speed over one process (same round)")
    speed.set_xticks(list(places.values()), [str(number) for number in places])
    traffic.set_ylabel("MB that leave a process in a step")
    traffic.set_xticks(list(places.values())[1:], [str(number) for number in list(places)[1:]])
    traffic.set_xlim(0.5, len(places) - 0.5)
    for axes in (speed, traffic):
        axes.set_xlabel("processes, one thread each")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside right center", frameon=False)
    rate = found["layouts"]["1"]["tokens_per_second"]["median"]
    figure.suptitle(f"{found['title']}; one process: {rate:,.0f} tokens/s", fontsize=9)
    write_figure(figure, path)


def _mark_cores(axes: Any, places: Mapping[int, int], cores: int) -> None:
    """Draw the ideal speedup of the cores, and shade where processes share them."""
    ideal = [min(number, cores) for number in places]
    axes.plot(
        list(places.values()), ideal, color="0.5", linestyle="--", linewidth=1.0,
        label=f"{cores} cores at best",
    )  # fmt: skip
    axes.set_ylim(0.0, 1.3 * max(ideal))
    crowded = [place for number, place in places.items() if number > cores]
    if crowded:
        left = min(crowded) - 0.5
        axes.axvspan(left, max(crowded) + 0.3, color="0.94", zorder=0)
        axes.annotate(
            f" more processes\n than the {cores} cores", (left, 0.98),
            xycoords=("data", "axes fraction"), va="top", fontsize=8, color="0.35",
        )  # fmt: skip


def plot_model(rows: Sequence[Mapping[str, Any]], assumptions: str, path: Path) -> None:
    """Plot the shares of a modelled step's time, a panel per expert parallel size."""
    sizes = list(dict.fromkeys(row["layout"]["expert"] for row in rows))
    figure, panels = new_panels(5.2 * len(sizes), 4.6, len(sizes))
    terms = [term for term in rows[0]["seconds"] if any(_share(row, term) >= 0.005 for row in rows)]
    for axes, size in zip(panels, sizes, strict=True):
        chosen = [row for row in rows if row["layout"]["expert"] == size]
        bottom = [0.0] * len(chosen)
        for index, term in enumerate(terms):
            heights = [100 * _share(row, term) for row in chosen]
            axes.bar(
                range(len(chosen)), heights, bottom=bottom, width=0.7, label=term,
                color=_COLOURS[index % len(_COLOURS)],
            )  # fmt: skip
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for place, row in enumerate(chosen):
            rate = row["tokens_per_second_and_gpu"]
            axes.annotate(f"{rate / 1e3:.0f}k", (place, 101), ha="center", fontsize=8)
        axes.set_xticks(range(len(chosen)), [f"{row['gpus']:,}" for row in chosen])
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 110)
        axes.set_title(f"EP {size} (above the bars: tokens/s and GPU)", fontsize=9)
    panels[0].set_ylabel("share of the step's time, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False,
        reverse=True,
    )  # fmt: skip
    figure.suptitle("Modelled, not measured: " + textwrap.fill(assumptions, 110), fontsize=8)
    write_figure(figure, path)


def _share(row: Mapping[str, Any], term: str) -> float:
    return float(row["seconds"][term] / row["step_seconds"])
