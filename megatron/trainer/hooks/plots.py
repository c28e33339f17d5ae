"""Draws plots of a run from its records."""

import math
from pathlib import Path
from typing import Any

from megatron.trainer.hooks.base import Hook
from megatron.trainer.io.atomic_write import atomic_write
from megatron.trainer.records.losses import (
    BITS_PER_BYTE,
    LOSSES,
    PERPLEXITY,
    PREFERENCES,
    loss_name,
)
from megatron.trainer.records.perplexity import figures_of
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.run_dir import RecordTail
from megatron.trainer.records.tasks import BITS, SHOWN, numbers_of, shown_accuracies
from megatron.trainer.records.thinned_curve import ThinnedCurve

_COLOURS = ("#2E3168", "#F0539B", "#43C5E0", "#E0A100", "#B11BE8")
_STYLES = ("-", "--", ":", "-.")


class RunCurves:
    """Collects the curves of a run's plots from its records, in memory that does not grow.

    Every curve is a number of the records over `consumed_tokens`.
    """

    def __init__(self) -> None:
        self.loss = ThinnedCurve()
        """Training loss."""
        self.unit = LOSSES["lm_loss"]
        """Of the losses."""
        self.validation: dict[str, ThinnedCurve] = {}
        """Validation loss by set."""
        self.accuracy: dict[str, ThinnedCurve] = {}
        """Accuracy by task."""
        self.bits: dict[str, ThinnedCurve] = {}
        """Bits per byte of the right choices by task."""
        self.perplexity: dict[str, ThinnedCurve] = {}
        """Of validation sets, over tokens and over documents."""
        self.valid_bits: dict[str, ThinnedCurve] = {}
        """Bits per byte of the same."""
        self.learning_rate = ThinnedCurve()
        self.sources: dict[str, ThinnedCurve] = {}
        """Tokens that each source has given."""
        self.preferences: dict[str, ThinnedCurve] = {}
        """Figures of alignment by their names in a record, in training."""
        self.valid_preferences: dict[str, dict[str, ThinnedCurve]] = {}
        """The same by validation set."""
        self.phases: list[tuple[int, str]] = []
        """Where a phase begins, in tokens at the last record before it, and its name."""
        self._before: Record | None = None

    def add(self, record: Record) -> None:
        """Take in the next record."""
        tokens = record["consumed_tokens"]
        self._add_evaluation(record, tokens)
        name = loss_name(record)
        if name is None:
            return
        self.unit = LOSSES[name]
        before, self._before = self._before, record
        if before is not None and before.get("phase") != record.get("phase"):
            self.phases.append((before["consumed_tokens"], str(record["phase"])))
        given = record.get("consumed_tokens_per_source", {})
        for source in given:
            if source not in self.sources:  # until now it has given nothing
                self.sources[source] = self.loss.at(0.0)
        for source, curve in self.sources.items():
            curve.add(tokens, given.get(source, 0))
        self.loss.add(tokens, _number(record[name]))
        _add_preferences(self.preferences, tokens, record)
        if "learning_rate" in record:
            self.learning_rate.add(tokens, _number(record["learning_rate"]))

    def _add_evaluation(self, record: Record, tokens: float) -> None:
        """Take in what an evaluation found; nothing of a step's record."""
        for name, loss in record.get("valid_loss", {}).items():
            self.validation.setdefault(name, ThinnedCurve()).add(tokens, _number(loss))
        for name, figures in record.get("valid_metrics", {}).items():
            _add_preferences(self.valid_preferences.setdefault(name, {}), tokens, figures)
        for curves, found in (
            (self.accuracy, shown_accuracies(record)),
            (self.bits, numbers_of(record, BITS)),
            (self.perplexity, figures_of(record, PERPLEXITY)),
            (self.valid_bits, figures_of(record, BITS_PER_BYTE)),
        ):
            for name, value in found.items():
                curves.setdefault(name, ThinnedCurve()).add(tokens, value)


class RunPlots(Hook):
    """Redraws losses, rate, sources, preferences and scores after evaluations and at the end.

    Args:
        metrics: the run's `metrics.jsonl`, of which each record is read once.
        directory: where the plots go; it is made.
    """

    def __init__(self, metrics: Path, directory: Path) -> None:
        self._records = RecordTail(metrics)
        self._directory = directory
        self._curves = RunCurves()

    def on_evaluation(self, record: Record) -> None:
        """Redraw."""
        self._draw()

    def on_end(self) -> None:
        """Redraw."""
        self._draw()

    def _draw(self) -> None:
        starts_over, records = self._records.read_new()
        if starts_over:
            self._curves = RunCurves()
        for record in records:
            self._curves.add(record)
        plot_losses(self._curves, self._directory / "loss.png")
        plot_learning_rate(self._curves, self._directory / "learning_rate.png")
        plot_sources(self._curves, self._directory / "sources.png")
        plot_preferences(self._curves, self._directory / "preferences.png")
        plot_tasks(self._curves, self._directory / "tasks.png")
        plot_bits(self._curves, self._directory / "bits_per_byte.png")


def plot_losses(curves: RunCurves, path: Path) -> None:
    """Draw losses over tokens; nothing without a training record."""
    if not curves.loss.points:
        return
    figure, axes = new_figure(7.0, 4.0)
    axes.plot(*_coordinates(curves.loss), color=_COLOURS[0], linewidth=1.0, label="training")
    for index, (name, curve) in enumerate(sorted(curves.validation.items())):
        axes.plot(
            *_coordinates(curve),
            color=_COLOURS[1:][index % len(_COLOURS[1:])],
            marker="o",
            markersize=4,
            label=f"validation: {name}",
        )
    _label(axes, curves, f"loss ({curves.unit})")
    axes.legend(frameon=False)
    write_figure(figure, path)


def plot_learning_rate(curves: RunCurves, path: Path) -> None:
    """Draw the learning rate over tokens; nothing without a training record."""
    if not curves.learning_rate.points:
        return
    figure, axes = new_figure(7.0, 3.0)
    axes.plot(*_coordinates(curves.learning_rate), color=_COLOURS[0], linewidth=1.5)
    _label(axes, curves, "learning rate")
    axes.set_ylim(bottom=0.0)
    write_figure(figure, path)


def plot_sources(curves: RunCurves, path: Path) -> None:
    """Draw how many tokens each source has given, over tokens; nothing for fewer than two."""
    from matplotlib.ticker import EngFormatter

    if len(curves.sources) < 2:
        return
    figure, axes = new_figure(7.0, 4.0)
    for index, (name, curve) in enumerate(curves.sources.items()):
        axes.plot(
            *_coordinates(curve),
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
            linewidth=1.5,
            label=name,
        )
    _label(axes, curves, "tokens from the source")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    write_figure(figure, path)


def plot_preferences(curves: RunCurves, path: Path) -> None:
    """Draw rewards and what else alignment reports over tokens; nothing for other stages."""
    shown = {
        unit: names
        for unit, names in PREFERENCES.items()
        if any(name in curves.preferences for name in names.values())
    }
    if not shown:
        return
    figure, _ = new_figure(7.0, 0.6 + 2.1 * len(shown))
    figure.clear()
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (unit, names) in zip(panels, shown.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for colour, (label, name) in zip(_COLOURS, names.items(), strict=False):
            _plot_preference(axes, curves, name, colour=colour, label=label or "training")
        _label(axes, curves, unit, has_x_label=axes is panels[-1])
        handles, labels = axes.get_legend_handles_labels()
        if len(handles) > 1:
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
            axes.legend(handles, labels, frameon=False, fontsize=8, ncols=len(handles), **above)
    figure.align_ylabels()
    write_figure(figure, path)


def _plot_preference(axes: Any, curves: RunCurves, name: str, *, colour: str, label: str) -> None:
    """Draw one figure of alignment: a line of training, and marks of validation sets."""
    if name in curves.preferences:
        axes.plot(*_coordinates(curves.preferences[name]), color=colour, lw=1.0, label=label)
    for number, (set_name, found) in enumerate(sorted(curves.valid_preferences.items())):
        if name in found:
            what = f"validation: {set_name}" if label == "training" else f"_{set_name}"
            axes.plot(
                *_coordinates(found[name]),
                color=colour,
                linestyle="none",
                marker="os^D"[number % 4],
                markersize=4,
                label=what,
            )


def _add_preferences(curves: dict[str, ThinnedCurve], tokens: float, figures: Record) -> None:
    for names in PREFERENCES.values():
        for name in names.values():
            if name in figures:
                curves.setdefault(name, ThinnedCurve()).add(tokens, _number(figures[name]))


def plot_tasks(curves: RunCurves, path: Path) -> None:
    """Draw each task's accuracy and bits per byte over tokens; nothing without tasks."""
    if not curves.accuracy and not curves.bits:
        return
    panels = {f"accuracy ({SHOWN})": curves.accuracy, "bits per byte of the answer": curves.bits}
    _plot_two(curves, panels, path)


def plot_bits(curves: RunCurves, path: Path) -> None:
    """Draw the validation sets' perplexity and bits per byte; nothing where no bytes are known."""
    if curves.valid_bits:
        panels = {"perplexity": curves.perplexity, "bits per byte": curves.valid_bits}
        _plot_two(curves, panels, path, is_log=True)


def _plot_two(
    curves: RunCurves,
    panels: dict[str, dict[str, ThinnedCurve]],
    path: Path,
    *,
    is_log: bool = False,
) -> None:
    """Draw two panels of named curves over tokens, the first on a logarithmic axis if asked."""
    figure, above = new_figure(7.0, 6.0, rows=2)
    for axes, (label, by_name) in zip(above, panels.items(), strict=True):
        for index, (name, curve) in enumerate(sorted(by_name.items())):
            axes.plot(
                *_coordinates(curve),
                color=_COLOURS[index % len(_COLOURS)],
                linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
                marker="o",
                markersize=4,
                label=name,
            )
        _label(axes, curves, label)
        if is_log and axes is above[0]:
            axes.set_yscale("log")
        if by_name:
            axes.legend(frameon=False)
    write_figure(figure, path)


def _number(value: float | None) -> float:
    """Replace None, which stands for a number that was not finite, by NaN."""
    return math.nan if value is None else value


def _coordinates(curve: ThinnedCurve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve.points], [y for _, y in curve.points]


def _label(axes: Any, curves: RunCurves, label: str, *, has_x_label: bool = True) -> None:
    """Label the axes; draw a line with its name where a phase begins."""
    from matplotlib.ticker import EngFormatter

    if has_x_label:
        axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(label)
    for border, name in curves.phases:
        axes.axvline(border, color="0.6", linewidth=0.8, linestyle=":", label="_phase")
        axes.annotate(
            f" {name}",
            (border, 0.98),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
            color="0.4",
        )


def new_figure(width: float, height: float, *, rows: int = 1) -> tuple[Any, Any]:
    """Make a figure and its axes, without a display and without the top and right spine.

    Args:
        width: in inches.
        height: in inches.
        rows: axes above each other; of more than one a list is returned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    found = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found[0] if rows == 1 else found


def write_figure(figure: Any, path: Path) -> None:
    """Write a PNG, replacing an older one atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


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
