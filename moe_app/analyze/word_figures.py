"""Makes the figures of vocabulary specialization and of similarity."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_app.analyze.chart import (
    DOMAIN_COLOURS,
    VARIANT_COLOURS,
    Heat,
    Level,
    Panel,
    PanelGrid,
    Series,
    layer_colours,
    top_of,
)
from moe_app.analyze.collection import Collection
from moe_app.analyze.manifest import Router
from moe_app.analyze.measure_words import VARIANTS
from moe_app.analyze.measures import Measured, ks_of, shown_routers
from moe_app.analyze.routing_figures import KIND_NAMES

_MOST_BARS = 12
_VARIANT_NAMES = {"input": "input", "predicted": "predicted", "ground_truth": "ground truth"}


def vocabulary_figures(measured: Measured, collection: Collection) -> list[PanelGrid]:
    """Draw figures 23, 30 and 32: per layer, per expert of the middle layer, and histograms."""
    figures = []
    for kind in collection.kinds():
        routers = shown_routers(collection, kind)
        middle = routers[(len(routers) - 1) // 2]
        suffix = "" if kind == "moe" else f"_{kind}"
        for k in ks_of(middle):
            name = "vocabulary" if k == 1 else "vocabulary_topk"
            panels = [_per_layer(measured, kind, k), _per_expert(measured, middle, k)]
            figures.append(
                PanelGrid(
                    name=f"{name}{suffix}",
                    title=f"Vocabulary specialization, top-k = {k}, {KIND_NAMES[kind]}",
                    about=_about_words(measured, k),
                    rows=[panels],
                    legend="Token",
                    panel_size=(4.8, 3.6),
                )
            )
        if measured.table("vocabulary_histogram").rows(kind=kind):
            figures.append(_histogram_figure(measured, kind, suffix, routers[-1]))
    return figures


def _about_words(measured: Measured, k: int) -> str:
    times = "" if k == 1 else f" (equation 8 times k = {k}, as the paper's figure 30 has it)"
    return (
        "For each token id the share of its occurrences that its most frequent expert serves"
        f"{times}, as a mean over the ids with at least {measured.notes['min_count']} occurrences:"
        " of the token that stands there, the one the model predicts, the one that follows. Left by"
        " layer, right for the experts of a middle layer that specialize most in inputs. The grey"
        " dashed level is what a random router gives for ids as frequent as these: above k / e,"
        " because the best of many experts is counted."
    )


def _per_layer(measured: Measured, kind: str, k: int) -> Panel:
    rows = measured.table("vocabulary").rows(kind=kind, k=k)
    levels = measured.table("vocabulary_random").rows(kind=kind, k=k, variant="input")
    layers = sorted({row["layer"] for row in rows})
    lines = []
    for variant in VARIANTS:
        found = {row["layer"]: row["mean"] for row in rows if row["variant"] == variant}
        lines.append(
            Series(
                name=_VARIANT_NAMES[variant],
                x=layers,
                y=[100 * k * found[layer] for layer in layers],
                colour=VARIANT_COLOURS[variant],
            )
        )
    level = float(np.mean([row["mean"] for row in levels])) if levels else 0.0
    return Panel(
        title="per layer",
        x_label="layer",
        y_label="vocabulary specialization (%)",
        lines=lines,
        levels=[Level(value=100 * k * level, name="random router")] if level == level else [],
        y_top=100.0,
        ticks=[(layer, str(layer)) for layer in layers],
    )


def _per_expert(measured: Measured, router: Router, k: int) -> Panel:
    rows = measured.table("vocabulary_experts").rows(kind=router.kind, k=k, layer=router.layer)
    means = {(row["variant"], row["expert"]): 100 * k * row["mean"] for row in rows}
    known = [
        expert
        for expert in range(router.num_experts)
        if means["input", expert] == means["input", expert]
    ]
    best = sorted(known, key=lambda expert: -means["input", expert])[:_MOST_BARS]
    whole = {
        row["variant"]: 100 * k * row["mean"]
        for row in measured.table("vocabulary").rows(kind=router.kind, k=k, layer=router.layer)
    }
    return Panel(
        title=f"per expert in layer {router.layer}",
        x_label="expert",
        bars=[
            Series(
                name=_VARIANT_NAMES[variant],
                x=[str(expert) for expert in best],
                y=[means[variant, expert] for expert in best],
                colour=VARIANT_COLOURS[variant],
            )
            for variant in VARIANTS
        ],
        levels=[
            Level(value=whole[variant], name="", colour=VARIANT_COLOURS[variant])
            for variant in VARIANTS
        ],
        y_top=100.0,
        is_ordered=True,
    )


def _histogram_figure(measured: Measured, kind: str, suffix: str, router: Router) -> PanelGrid:
    rows = measured.table("vocabulary_histogram").rows(kind=kind)
    experts = sorted({row["expert"] for row in rows})
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    grid: list[list[Panel]] = []
    for number, domain in enumerate(domains):
        panels = []
        for expert in experts:
            mine = [row for row in rows if (row["domain"], row["expert"]) == (domain, expert)]
            centres = [50 * (row["from"] + row["to"]) for row in mine]
            panels.append(
                Panel(
                    title=f"{domain}, expert {expert}",
                    x_label="tokens of an id (%)" if domain == domains[-1] else "",
                    y_label="ids (%)" if expert == experts[0] else "",
                    bars=[
                        Series(
                            name=domain,
                            x=centres,
                            y=[row["percent"] for row in mine],
                            colour=DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)],
                        )
                    ],
                    levels=[
                        Level(
                            value=100 * router.topk / router.num_experts,
                            name="random router",
                            is_vertical=True,
                        )
                    ],
                    y_top=100.0,
                )
            )
        grid.append(panels)
    return PanelGrid(
        name=f"vocabulary_histogram{suffix}",
        title=f"Shares of token ids by domain, layer {router.layer}, {KIND_NAMES[kind]}",
        about=(
            "For some experts, how many of a domain's ids (at least 8 occurrences) send which"
            " share of their tokens to the expert. A random router gives a single hump at k / e,"
            " the dashed line; peaks at 0 and 100 % are ids that never and always go there."
        ),
        rows=grid,
        legend="Domain",
        panel_size=(3.2, 2.2),
    )


def similarity_figures(measured: Measured, collection: Collection) -> list[PanelGrid]:
    """Draw cosines between experts' weights, and attention against feed-forward routing."""
    figures = []
    names = {table.name for table in measured.tables}
    if "similarity_mean" in names:
        for kind in collection.kinds():
            rows = measured.table("similarity_mean").rows(kind=kind)
            figures.append(_cosine_figure(rows, kind))
    if "similarity_routers" in names:
        figures.append(_routers_figure(measured, collection))
    return figures


def _cosine_figure(rows: Sequence[dict[str, Any]], kind: str) -> PanelGrid:
    whats = list(dict.fromkeys(row["weights"] for row in rows))
    panels = []
    for key, title in (("mean", "mean of all pairs"), ("highest", "most similar pair")):
        lines = [
            Series(
                name=what,
                x=[row["layer"] for row in rows if row["weights"] == what],
                y=[row[key] for row in rows if row["weights"] == what],
                colour=colour,
            )
            for what, colour in zip(whats, layer_colours(len(whats)), strict=True)
        ]
        panels.append(
            Panel(
                title=title,
                x_label="layer",
                y_label="cosine",
                lines=lines,
                levels=[Level(value=0.0, name="random weights")],
                ticks=[(layer, str(layer)) for layer in sorted({row["layer"] for row in rows})],
            )
        )
    return PanelGrid(
        name="similarity" if kind == "moe" else f"similarity_{kind}",
        title=f"Similarity of experts' weights, {KIND_NAMES[kind]}",
        about=(
            "The cosine between two experts of a layer: of their rows in the router, and of their"
            " matrices. Random weights give 0 on average, and for a pair 1 / sqrt(number of"
            " weights) or so; experts that came from copies of one matrix start at 1."
        ),
        rows=[panels],
        legend="Weights",
        panel_size=(4.2, 3.2),
    )


def _routers_figure(measured: Measured, collection: Collection) -> PanelGrid:
    rows = measured.table("similarity_routers").rows()
    layers = [router.layer for router in shown_routers(collection, "moa")]
    panels = []
    for layer in layers:
        mine = [row for row in rows if row["layer"] == layer]
        shape = [1 + max(row[f"{kind}_expert"] for row in mine) for kind in ("moa", "moe")]
        values = np.array([100 * row["share"] for row in mine]).reshape(shape)
        heat = Heat(
            values=values,
            rows=[str(index) for index in range(shape[0])],
            columns=[str(index) for index in range(shape[1])],
            most=100.0,
        )
        panels.append(
            Panel(
                title=f"layer {layer}",
                x_label="feed-forward expert",
                y_label="attention expert",
                heat=heat,
            )
        )
    most = top_of([float(np.nanmax(panel.heat.values)) for panel in panels if panel.heat])
    rescaled = [
        Panel(
            title=panel.title,
            x_label=panel.x_label,
            y_label=panel.y_label,
            heat=Heat(
                values=panel.heat.values,
                rows=panel.heat.rows,
                columns=panel.heat.columns,
                most=min(100.0, most),
            ),
        )
        for panel in panels
        if panel.heat
    ]
    return PanelGrid(
        name="similarity_routers",
        title="Attention against feed-forward routing (%)",
        about=(
            "Of the tokens that chose an attention expert, the share that chose each feed-forward"
            " expert of the same layer. Where the two routers are independent, all rows are alike;"
            " similarity_information.csv says how much one choice tells of the other, in nats."
        ),
        rows=[rescaled],
        panel_size=(4.2, 3.8),
    )
