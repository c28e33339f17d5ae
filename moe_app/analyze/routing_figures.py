"""Makes the figures of the measures, in the layout of OLMoE's paper."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_app.analyze.chart import (
    DOMAIN_COLOURS,
    GREY,
    PALE,
    Flow,
    Heat,
    Level,
    Node,
    Panel,
    PanelGrid,
    Series,
    layer_colours,
    top_of,
)
from moe_app.analyze.collection import Collection
from moe_app.analyze.manifest import Router
from moe_app.analyze.measures import Measured, ks_of, shown_routers
from moe_app.analyze.texts import ALL
from moe_ext.analysis.coactivation import JointCounts, random_coactivation

KIND_NAMES = {"moe": "feed-forward experts", "moa": "attention experts"}
_NAMED = 6
"""Experts of the most and of the least load that the legend of figure 10 names."""
_FLOW_FACTOR = 1.5
"""Experts above so many times an even share get a box of their own (figure 35)."""
_MOST_BOXES = 24
"""Boxes of a layer, however many experts are above that: more cannot be told apart."""


def saturation_figures(measured: Measured, kinds: Sequence[str]) -> list[PanelGrid]:
    """Draw figure 20: a panel for k = 1 and one for k, a line per layer."""
    table = measured.tables[0]
    tokens = {
        row["iteration"]: row["consumed_tokens"] for row in measured.table("checkpoints").rows()
    }
    levels = {
        (row["kind"], row["k"]): row["value"] for row in measured.table("saturation_random").rows()
    }
    figures = []
    for kind in kinds:
        rows = table.rows(kind=kind)
        layers = sorted({row["layer"] for row in rows})
        iterations = sorted({row["iteration"] for row in rows})
        colours = dict(zip(layers, layer_colours(len(layers)), strict=True))
        panels = []
        for k in sorted({row["k"] for row in rows}):
            found = {
                (row["layer"], row["iteration"]): row["saturation"] for row in rows if row["k"] == k
            }
            lines = [
                Series(
                    name=f"layer {layer}",
                    x=list(range(len(iterations))),
                    y=[100 * found[layer, each] for each in iterations],
                    colour=colours[layer],
                    hover=[f"at iteration {each:,}" for each in iterations],
                )
                for layer in layers
            ]
            panels.append(
                Panel(
                    title=f"top-k = {k}",
                    x_label="iteration and tokens of training",
                    y_label="router saturation (%)",
                    lines=lines,
                    levels=[Level(value=100 * levels[kind, k], name="random router")],
                    y_top=top_of([v for line in lines for v in line.y], most=100),
                    # As many places as checkpoints, as in the paper, whatever lies between.
                    ticks=[
                        (place, f"{each:,}\n{_tokens(tokens[each])}")
                        for place, each in enumerate(iterations)
                    ],
                )
            )
        figures.append(
            PanelGrid(
                name=_named("saturation", kind),
                title=f"Router saturation, {KIND_NAMES[kind]}",
                about=(
                    "The share of a token's experts that are the same as at the last checkpoint"
                    f" (iteration {measured.notes['final']:,}): for the first expert alone, and for"
                    " all k. A line that is high early belongs to a layer that settled early. Two"
                    " unrelated routers agree on 1 / e and k / e, the dashed lines."
                ),
                rows=[panels],
                legend="Layer",
                panel_size=(4.6, 3.8),
            )
        )
    return figures


def _tokens(count: int) -> str:
    if count < 0:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _named(name: str, kind: str) -> str:
    """Return a figure's name; those of attention experts say so."""
    return name if kind == "moe" else f"{name}_{kind}"


def coactivation_figures(measured: Measured, collection: Collection) -> list[PanelGrid]:
    """Draw figure 21: the strongest experts of first, middle and last layer as heat maps."""
    values: dict[Router, np.ndarray] = measured.notes["values"]  # type: ignore[assignment]
    orders = measured.table("coactivation_order").rows()
    figures = []
    for kind in collection.kinds():
        routers = shown_routers(collection, kind)
        panels = []
        for router in routers:
            mine = [
                each for each in orders if (each["kind"], each["layer"]) == (kind, router.layer)
            ]
            chosen = [each["expert"] for each in sorted(mine, key=lambda each: each["cluster"])]
            block = 100 * values[router][np.ix_(chosen, chosen)]
            np.fill_diagonal(block, np.nan)
            names = [str(expert) for expert in chosen]
            # 0 to 60 as in the paper, unless that would hide differences.
            most = max(60.0, top_of(block.ravel().tolist(), step=20.0, most=100.0))
            heat = Heat(values=block, rows=names, columns=names, most=most)
            panels.append(
                Panel(
                    title=f"layer {router.layer}", x_label="expert j", y_label="expert i", heat=heat
                )
            )
        level = random_coactivation(routers[0].num_experts, routers[0].topk)[0]
        figures.append(
            PanelGrid(
                name=_named("coactivation", kind),
                title=f"Expert co-activation (%), {KIND_NAMES[kind]}",
                about=(
                    "Of the tokens that chose expert i, the share that chose expert j as well, for"
                    " the experts of the strongest pairs; experts often chosen together stand side"
                    f" by side. A random router gives {100 * level:.1f} % everywhere, which is pale"
                    " here; dark blocks are groups that work together."
                ),
                rows=[panels],
                panel_size=(4.0, 3.5),
            )
        )
    return figures


def domain_figures(measured: Measured, collection: Collection) -> list[PanelGrid | Flow]:
    """Draw figures 22, 34 and 35: bars per domain and layer, and where tokens go."""
    rows = measured.tables[0].rows()
    figures: list[PanelGrid | Flow] = []
    for kind in collection.kinds():
        routers = shown_routers(collection, kind)
        for k in sorted(ks_of(routers[0]), reverse=True):
            found: dict[tuple[int, str], list[float]] = {}
            for row in rows:
                if row["kind"] == kind and row["k"] == k:
                    found.setdefault((row["layer"], row["domain"]), []).append(100 * row["share"])
            figures.append(_domain_bars(found, kind, k, routers, collection))
        if len(routers) > 1:
            figures.append(_flow_figure(measured, kind, routers))
    return figures


def _domain_bars(
    found: dict[tuple[int, str], list[float]],
    kind: str,
    k: int,
    routers: Sequence[Router],
    collection: Collection,
) -> PanelGrid:
    shown = {
        (router.layer, domain): found[router.layer, domain]
        for router in routers
        for domain in collection.manifest.domains
    }
    top = top_of([value for values in shown.values() for value in values], most=100)
    grid = []
    for number, domain in enumerate(collection.manifest.domains):
        colour = DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)]
        grid.append(
            [
                Panel(
                    title=f"{domain}, layer {router.layer}",
                    x_label="expert" if number == len(collection.manifest.domains) - 1 else "",
                    y_label="tokens (%)" if router is routers[0] else "",
                    bars=[
                        Series(
                            name=domain,
                            x=list(range(router.num_experts)),
                            y=shown[router.layer, domain],
                            colour=colour,
                        )
                    ],
                    levels=[Level(value=100 * k / router.num_experts, name="random router")],
                    y_top=top,
                )
                for router in routers
            ]
        )
    chosen = "as the first one" if k == 1 else f"among the {k}"
    level = f"{100 * k / routers[0].num_experts:.3g}"
    return PanelGrid(
        name=_named("domains" if k > 1 or routers[0].topk == 1 else "domains_top1", kind),
        title=f"Domain specialization, top-k = {k}, {KIND_NAMES[kind]}",
        about=(
            f"The share of a domain's tokens that choose each expert {chosen}. A random router"
            f" gives every expert the dashed line, {level} %: an expert far above it in one domain"
            " and below it in another is specialized."
        ),
        rows=grid,
        legend="Domain",
        panel_size=(3.9, 2.2),
    )


def _flow_figure(measured: Measured, kind: str, routers: Sequence[Router]) -> Flow:
    flows: dict[tuple[Router, Router], JointCounts] = measured.notes["flows"]  # type: ignore[assignment]
    colours = layer_colours(len(routers))
    nodes: list[Node] = []
    boxes: dict[tuple[int, int], int] = {}  # column and expert; -1 for the others
    for column, router in enumerate(routers):
        pair = next(pair for pair in flows if router in pair)
        counts = flows[pair].together.sum(axis=1 if pair[0] is router else 0)
        share = counts / max(1, counts.sum())
        large = np.flatnonzero(share > _FLOW_FACTOR / router.num_experts)
        largest = large[np.argsort(-share[large], kind="stable")][:_MOST_BOXES]
        for expert in [*largest.tolist(), -1]:
            boxes[column, expert] = len(nodes)
            name = "other" if expert < 0 else f"expert {expert}"
            nodes.append(
                Node(name=name, column=column, colour=GREY if expert < 0 else colours[column])
            )
    links: dict[tuple[int, int], float] = {}
    for column, pair in enumerate(itertools.pairwise(routers)):
        joint = flows[pair].together
        for a, b in zip(*np.nonzero(joint), strict=True):
            source = boxes.get((column, int(a)), boxes[column, -1])
            target = boxes.get((column + 1, int(b)), boxes[column + 1, -1])
            links[source, target] = links.get((source, target), 0.0) + float(joint[a, b])
    return Flow(
        name=_named("domains_flow", kind),
        title=f"Flow of tokens between first experts, {KIND_NAMES[kind]}",
        about=(
            "Where the tokens of an expert go in a later layer, by each token's first expert."
            f" Experts with more than {_FLOW_FACTOR} times an even share of all tokens have a box,"
            f" at most {_MOST_BOXES} a layer; the rest is 'other'. A random router has no such"
            " expert, and every band goes to all experts alike."
        ),
        columns=[f"layer {router.layer}" for router in routers],
        nodes=nodes,
        links=[(*ends, value) for ends, value in sorted(links.items())],
    )


def load_figures_of(measured: Measured, collection: Collection) -> list[PanelGrid]:
    """Draw the load-balancing loss, the busiest expert and dead experts by layer and domain."""
    rows = measured.tables[0].rows()
    figures = []
    for kind in collection.kinds():
        panels = []
        for key, title, level in (
            ("load_balancing_loss", "load-balancing loss", 1.0),
            ("max_load_ratio", "busiest expert / mean", 1.0),
            ("dead", "experts without a token", 0.0),
        ):
            lines = []
            for number, domain in enumerate((*collection.manifest.domains, ALL)):
                mine = [row for row in rows if (row["kind"], row["domain"]) == (kind, domain)]
                colour = GREY if domain == ALL else DOMAIN_COLOURS[number % len(DOMAIN_COLOURS)]
                lines.append(
                    Series(
                        name="all together" if domain == ALL else domain,
                        x=[row["layer"] for row in mine],
                        y=[row[key] for row in mine],
                        colour=colour,
                    )
                )
            values = [value for line in lines for value in line.y]
            panels.append(
                Panel(
                    title=title,
                    x_label="layer",
                    lines=lines,
                    levels=[Level(value=level, name="even load")],
                    y_top=top_of(values, step=0.5 if key != "dead" else 2.0),
                    ticks=[(row["layer"], str(row["layer"])) for row in mine],
                    is_count=key == "dead",
                )
            )
        figures.append(
            PanelGrid(
                name=_named("load", kind),
                title=f"Expert load, {KIND_NAMES[kind]}",
                about=(
                    "How evenly each domain's tokens load the experts: the load-balancing loss on"
                    " MegaBlocks' scale (1 is even; transformers' is k times it), the busiest"
                    " expert's tokens over the mean, and experts that no token chose. A random"
                    " router gives 1, 1 and 0 but for chance. Training balances whole batches, so"
                    " that a single domain may be far from even where experts are specialized."
                ),
                rows=[panels],
                legend="Domain",
                panel_size=(3.6, 3.2),
            )
        )
    return figures


def history_figure(records: Sequence[dict[str, Any]], key: str, layer: int) -> PanelGrid:
    """Draw figure 10: each expert's share of a layer's tokens over training."""
    experts = len(records[-1][key][layer])
    loads = np.array([record[key][layer] for record in records], dtype=np.float64)
    order = np.argsort(loads[-1])
    named = list(dict.fromkeys([*order[:_NAMED].tolist(), *order[-_NAMED:].tolist()]))
    colours = dict(zip(named, layer_colours(len(named)), strict=True))
    lines = [
        Series(
            name=f"expert {expert}",
            x=[record["iteration"] for record in records],
            y=(100 * loads[:, expert] / experts).tolist(),
            colour=colours.get(expert, PALE),
            is_named=expert in named,
        )
        # Those with a name lie on top.
        for expert in sorted(range(experts), key=lambda expert: expert in named)
    ]
    kind = "moe" if key == "load" else "moa"
    panel = Panel(
        x_label="iteration",
        y_label="assignments (%)",
        lines=lines,
        levels=[Level(value=100 / experts, name="even load")],
        y_top=top_of([v for line in lines for v in line.y], step=1.0),
    )
    return PanelGrid(
        name=_named("load_history", kind),
        title=f"Share of each expert in layer {layer} during training, {KIND_NAMES[kind]}",
        about=(
            "Each expert's share of the assignments in the batches of training, from the run's"
            " records. With a load-balancing loss the lines stay near the dashed one, an even"
            " share; without it a few experts take nearly all. Those with the least and the most in"
            " the end have colours and names."
        ),
        rows=[[panel]],
        panel_size=(7.5, 4.2),
    )
