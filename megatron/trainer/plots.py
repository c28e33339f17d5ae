"""Plots of a run, drawn from its records."""

from pathlib import Path
from typing import Any

from megatron.trainer.hooks import Hook, Record, read_records

_TRAIN_COLOUR = "#2E3168"
_VALID_COLOURS = ("#F0539B", "#43C5E0", "#E0A100", "#B11BE8")


class LossPlot(Hook):
    """Redraws the loss plot after every evaluation and at the end."""

    def __init__(self, metrics: Path, path: Path) -> None:
        self._metrics = metrics
        self._path = path

    def on_evaluation(self, record: Record) -> None:
        """Redraw."""
        plot_losses(self._metrics, self._path)

    def on_end(self) -> None:
        """Redraw."""
        plot_losses(self._metrics, self._path)


def plot_losses(metrics: Path, path: Path) -> None:
    """Draw losses over tokens from `metrics.jsonl`; nothing without records."""
    from matplotlib.ticker import EngFormatter

    records = read_records(metrics)
    train = [record for record in records if "lm_loss" in record]
    valid = [record for record in records if "valid_loss" in record]
    if not train:
        return
    figure, axes = new_figure(7.0, 4.0)
    axes.plot(
        [record["consumed_tokens"] for record in train],
        [record["lm_loss"] for record in train],
        color=_TRAIN_COLOUR,
        linewidth=1.0,
        label="training",
    )
    names = sorted({name for record in valid for name in record["valid_loss"]})
    for index, name in enumerate(names):
        points = [record for record in valid if name in record["valid_loss"]]
        axes.plot(
            [record["consumed_tokens"] for record in points],
            [record["valid_loss"][name] for record in points],
            color=_VALID_COLOURS[index % len(_VALID_COLOURS)],
            marker="o",
            markersize=4,
            label=f"validation: {name}",
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    write_figure(figure, path)


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
