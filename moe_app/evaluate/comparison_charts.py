"""Draws evaluations among the papers' models: MMLU over cost, and tasks over training FLOPs."""

import io
import re
from collections.abc import Sequence
from typing import Any

from moe_app.evaluate.published import Evaluation, PublishedTable

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6270",
    "axes.grid": False,
}
_MOE, _DENSE, _OURS = "#F0539B", "#2E3168", "#0c9eb0"
_LINES = ("#F0539B", "#43C5E0", "#2E3168")
_DPI = 110
_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)B(?:-\d+B)?")
_ACTIVE = {"OLMoE-1B-7B": 1.3, "JetMoE-2B-9B": 2.2}
"""Billions of active parameters, from OLMoE's Figure 1 and JetMoE's Table 3; others by name."""

CaptionedImage = tuple[str, bytes]
"""Caption and PNG."""


def draw_charts(
    tables: Sequence[PublishedTable], evaluations: Sequence[Evaluation]
) -> dict[str, CaptionedImage]:
    """Draw the figures.

    Args:
        tables: of the papers.
        evaluations: drawn among them, if they have what an axis shows.
    """
    from matplotlib import rc_context

    by_name = {table.name: table for table in tables}
    with rc_context(_STYLE):
        return {
            "mmlu_over_active_parameters": _scatter(by_name["olmoe_table_4"], evaluations),
            "tasks_over_training_flops": _over_flops(by_name["olmoe_figure_3"], evaluations),
        }


def active_billions(model: str) -> float | None:
    """Return the active parameters of a published model, in billions, from what its name says."""
    found = _IN_NAME.search(model)
    return _ACTIVE.get(model) or (float(found[1]) if found else None)


def _scatter(table: PublishedTable, evaluations: Sequence[Evaluation]) -> CaptionedImage:
    column = [name for name, _ in table.columns].index("MMLU")
    figure, axes = _figure(1, 1, (7.2, 4.6))
    (ax,) = axes
    for name, values in table.rows.items():
        cost, score = active_billions(name), values[column]
        if cost is not None and score is not None:
            is_mixture = bool(re.search(r"\dB-\d+B", name))
            _point(ax, cost, score, name, _MOE if is_mixture else _DENSE)
    missing = []
    for evaluation in evaluations:
        score = table.row_of(evaluation)[column]
        harness = evaluation.value(("mmlu", "acc,none"))
        score = score if score is not None or harness is None else 100 * harness
        cost = evaluation.value(("config", "active_parameters", 1e-9))
        if score is None or cost is None:
            missing.append(evaluation.name)
        else:
            _point(ax, cost, score, f"▸ {evaluation.name}", _OURS)
    ax.set_xscale("log")
    ticks = [0.1, 0.3, 1, 2, 3, 5, 9]
    low, high = ax.get_xlim()
    ax.set_xticks([each for each in ticks if low <= each <= high])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("active parameters (billions)")
    ax.set_ylabel("MMLU (%)")
    handles = [ax.scatter([], [], color=colour, s=22) for colour in (_MOE, _DENSE, _OURS)]
    names = ["mixtures of experts", "dense models", "these evaluations"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        f"MMLU over active parameters, as in OLMoE's Figure 1. Scores: {table.source}. Active"
        " parameters: OLMoE 1.3 (its Figure 1), JetMoE 2.2 (JetMoE, Table 3), others as in their"
        " names."
    )
    return caption + _left_out(missing, "MMLU or no count of parameters"), _png(figure)


def _over_flops(table: PublishedTable, evaluations: Sequence[Evaluation]) -> CaptionedImage:
    figure, axes = _figure(2, 3, (10.0, 5.6))
    costs = [each.value(("config", "training_flops", 1.0)) for each in evaluations]
    rows = [table.row_of(each) for each in evaluations]
    missing = [
        each.name
        for each, cost, row in zip(evaluations, costs, rows, strict=True)
        if not cost or all(value is None for value in row)
    ]
    for number, (ax, (task, _)) in enumerate(zip(axes, table.columns, strict=True)):
        for (name, values), colour in zip(table.rows.items(), _LINES, strict=True):
            ax.axhline(values[number], color=colour, linewidth=1.0, label=name)
        points = [
            (cost, score, each.name)
            for cost, row, each in zip(costs, rows, evaluations, strict=True)
            if cost and (score := row[number]) is not None
        ]
        for cost, score, name in points:
            _point(ax, cost, score, f"▸ {name}", _OURS)
        if points:
            ax.set_xscale("log")
            ax.set_xlabel("training FLOPs")
        else:
            ax.set_xticks([])
        ax.margins(y=0.15)
        ax.set_title(f"{task} (%)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        f"Tasks over training FLOPs, as in OLMoE's Figure 3. Lines: {table.source}. The papers'"
        " models are drawn at the height where they ended, without their way there."
    )
    return caption + _left_out(missing, "of these tasks or no training FLOPs"), _png(figure)


def _left_out(names: Sequence[str], what: str) -> str:
    return f" Not drawn, having no {what}: {', '.join(names)}." if names else ""


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _point(ax: Any, x: float, y: float, name: str, colour: str) -> None:
    ax.scatter([x], [y], color=colour, s=22)
    # A dollar sign would begin a formula.
    text = name.replace("$", r"\$")
    ax.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()
