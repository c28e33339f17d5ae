"""Plots of a run, drawn from its records."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.hooks.base import Hook, Record, read_records

_COLOURS = ("#2E3168", "#F0539B", "#43C5E0", "#E0A100", "#B11BE8")
_STYLES = ("-", "--", ":", "-.")


class RunPlots(Hook):
    """Redraws losses, learning rate and sources after every evaluation and at the end."""

    def __init__(self, metrics: Path, directory: Path) -> None:
        self._metrics = metrics
        self._directory = directory

    def on_evaluation(self, record: Record) -> None:
        """Redraw."""
        plot_run(self._metrics, self._directory)

    def on_end(self) -> None:
        """Redraw."""
        plot_run(self._metrics, self._directory)


def plot_run(metrics: Path, directory: Path) -> None:
    """Draw what `metrics.jsonl` holds into `directory`; nothing without records."""
    records = read_records(metrics)
    plot_losses(records, directory / "loss.png")
    plot_learning_rate(records, directory / "learning_rate.png")
    plot_sources(records, directory / "sources.png")


def plot_losses(records: Sequence[Record], path: Path) -> None:
    """Draw losses over tokens; nothing without a training record."""
    train = [record for record in records if "lm_loss" in record]
    valid = [record for record in records if "valid_loss" in record]
    if not train:
        return
    figure, axes = new_figure(7.0, 4.0)
    axes.plot(*_over_tokens(train, "lm_loss"), color=_COLOURS[0], linewidth=1.0, label="training")
    names = sorted({name for record in valid for name in record["valid_loss"]})
    for index, name in enumerate(names):
        points = [record for record in valid if name in record["valid_loss"]]
        axes.plot(
            [record["consumed_tokens"] for record in points],
            [record["valid_loss"][name] for record in points],
            color=_COLOURS[1:][index % len(_COLOURS[1:])],
            marker="o",
            markersize=4,
            label=f"validation: {name}",
        )
    _finish(axes, train, "loss (nats per token)")
    axes.legend(frameon=False)
    write_figure(figure, path)


def plot_learning_rate(records: Sequence[Record], path: Path) -> None:
    """Draw the learning rate over tokens; nothing without a training record."""
    train = [record for record in records if "learning_rate" in record]
    if not train:
        return
    figure, axes = new_figure(7.0, 3.0)
    axes.plot(*_over_tokens(train, "learning_rate"), color=_COLOURS[0], linewidth=1.5)
    _finish(axes, train, "learning rate")
    axes.set_ylim(bottom=0.0)
    write_figure(figure, path)


def plot_sources(records: Sequence[Record], path: Path) -> None:
    """Draw how many tokens each source has given, over tokens; nothing for fewer than two."""
    from matplotlib.ticker import EngFormatter

    train = [record for record in records if "consumed_tokens_per_source" in record]
    names = dict.fromkeys(name for record in train for name in record["consumed_tokens_per_source"])
    if len(names) < 2:
        return
    figure, axes = new_figure(7.0, 4.0)
    for index, name in enumerate(names):
        axes.plot(
            [record["consumed_tokens"] for record in train],
            [record["consumed_tokens_per_source"].get(name, 0) for record in train],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
            linewidth=1.5,
            label=name,
        )
    _finish(axes, train, "tokens from the source")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    write_figure(figure, path)


def _over_tokens(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    return (
        [record["consumed_tokens"] for record in records],
        [record[key] for record in records],
    )


def _finish(axes: Any, records: Sequence[Record], label: str) -> None:
    """Label the axes; draw a line with its name where a phase begins."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(label)
    for before, after in itertools.pairwise(records):
        if before.get("phase") != after.get("phase"):
            border = before["consumed_tokens"]
            axes.axvline(border, color="0.6", linewidth=0.8, linestyle=":", label="_phase")
            axes.annotate(
                f" {after['phase']}",
                (border, 0.98),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=8,
                color="0.4",
            )


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, without a display and without the top and right spine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write_figure(figure: Any, path: Path) -> None:
    """Write a PNG, replacing an older one at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def plot_expert_load(load: list[list[float]], path: Path, *, title: str) -> None:
    """Draw each layer's load per expert as a heat map.

    Args:
        load: a row per layer, a column per expert; 1 is an even share.
        path: where the PNG goes.
        title: says when it was measured.
    """
    from matplotlib.colors import TwoSlopeNorm

    layers, experts = len(load), len(load[0])
    figure, axes = new_figure(max(4.0, 1.5 + 0.11 * experts), max(2.2, 1.4 + 0.22 * layers))
    highest = max(2.0, *(max(row) for row in load))
    image = axes.imshow(
        load,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=highest),
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, layers // 16)
    axes.set_yticks(range(0, layers, step), [str(layer + 1) for layer in range(0, layers, step)])
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="load (1 = even share)")
    write_figure(figure, path)
