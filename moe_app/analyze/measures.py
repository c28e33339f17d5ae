"""Turns collections into the numbers of the measures: saturation, co-activation, domains, load."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.trainer.errors import DataError
from moe_app.analyze.collection import Collection, require_comparable
from moe_app.analyze.manifest import Manifest, Router
from moe_app.analyze.tables import Table, from_rows, joined
from moe_app.analyze.texts import ALL
from moe_ext.analysis.coactivation import (
    CoActivation,
    JointCounts,
    cluster_order,
    random_coactivation,
    strongest,
)
from moe_ext.analysis.load import BalanceSums, DomainCounts, load_figures, pooled_loss
from moe_ext.analysis.saturation import Saturation, random_saturation


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds a measure's tables; the first is the one that has its name."""

    tables: list[Table]
    notes: dict[str, object] = field(default_factory=dict)
    """What figures need besides."""
    missing: str = ""
    """Why the measure, or a part of it, could not be computed."""

    def table(self, name: str) -> Table:
        """Return a table by name."""
        return next(table for table in self.tables if table.name == name)


def ks_of(router: Router) -> list[int]:
    """Return the numbers of experts for which a measure is computed: 1 and k."""
    return sorted({1, router.topk})


def _has_no_place(manifest: Manifest) -> bool:
    """Return whether nothing says which checkpoint of its run a model is."""
    return manifest.source_kind == "hf" and (manifest.iteration, manifest.consumed_tokens) == (
        0,
        -1,
    )


def measure_saturation(collections: Sequence[Collection]) -> Measured:
    """Compare every checkpoint with the one of the most iterations.

    Raises:
        DataError: there are fewer than two, or they cannot be compared.
    """
    if len(collections) < 2:
        raise DataError(
            f"saturation compares checkpoints, and {len(collections)} is given; collect the same"
            " text with an earlier checkpoint of the run (--ckpt-step), and give both"
        )
    unknown = [m.source for m in (each.manifest for each in collections) if _has_no_place(m)]
    if unknown:
        raise DataError(
            f"{unknown[0]} does not say how far its model was trained, so it has no place among"
            " checkpoints; give its directory a name like step5000-tokens20B (a link will do) and"
            " collect from that"
        )
    ordered = sorted(collections, key=lambda each: each.manifest.iteration)
    iterations = [each.manifest.iteration for each in ordered]
    twice = [str(a) for a, b in itertools.pairwise(iterations) if a == b]
    if twice:
        raise DataError(
            f"two collections are of iteration {twice[0]}; each checkpoint of a run is given once;"
            " leave one out"
        )
    *earlier, final = ordered
    require_comparable([final, *earlier])
    rows = []
    for collection in earlier:
        for router, counts in _compare(collection, final).items():
            values = {router.topk: counts.value(), 1: counts.first_value()}
            rows += [
                (router.kind, router.layer, k, collection.manifest.iteration, values[k])
                for k in ks_of(router)
            ]
    checkpoints = [
        (m.iteration, m.consumed_tokens, m.source, m.model_hash)
        for m in (each.manifest for each in ordered)
    ]
    return Measured(
        tables=[
            from_rows(
                "saturation", ["kind", "layer", "k", "iteration", "saturation"], sorted(rows)
            ),
            from_rows(
                "checkpoints", ["iteration", "consumed_tokens", "source", "model_hash"], checkpoints
            ),
            _random_levels("saturation", final, random_saturation),
        ],
        notes={"final": final.manifest.iteration, "final_tokens": final.manifest.consumed_tokens},
    )


def _compare(earlier: Collection, final: Collection) -> dict[Router, Saturation]:
    routers = final.routers()
    counts = {router: Saturation(router.num_experts, router.topk) for router in routers}
    names = [f"{router.name}.experts" for router in routers]
    both = zip(earlier.tokens("input", *names), final.tokens("input", *names), strict=True)
    for before, after in both:
        if not np.array_equal(before["input"], after["input"]):
            raise DataError(
                f"{earlier.directory} and {final.directory} hold different tokens; the same tokens"
                " must be compared; collect both again"
            )
        for router, name in zip(routers, names, strict=True):
            counts[router].add(before[name], after[name])
    return counts


def _random_levels(name: str, collection: Collection, level: object) -> Table:
    """Return a table of what a random router gives, by kind and k."""
    assert callable(level)
    rows = {
        (router.kind, k, level(router.num_experts, k))
        for router in collection.routers()
        for k in ks_of(router)
    }
    return from_rows(f"{name}_random", ["kind", "k", "value"], sorted(rows))


def measure_coactivation(collection: Collection, *, num_strongest: int = 16) -> Measured:
    """Count which experts of a layer are chosen together."""
    routers = collection.routers()
    counts = {router: CoActivation(router.num_experts) for router in routers}
    for arrays in collection.tokens(*(f"{router.name}.experts" for router in routers)):
        for router in routers:
            counts[router].add(arrays[f"{router.name}.experts"])
    exact, adjacent, orders, levels = [], [], [], set()
    for router, found in counts.items():
        values, neighbours = found.values(), found.adjacent_values()
        exact.append(_pairs("coactivation", router, values))
        adjacent.append(_pairs("coactivation_adjacent", router, neighbours))
        chosen = strongest(values, num_strongest)
        inner = cluster_order(values[np.ix_(chosen, chosen)])
        for rank, expert in enumerate(chosen):
            seam = inner.index(rank)
            orders.append((router.kind, router.layer, expert, rank, seam))
        both = random_coactivation(router.num_experts, router.topk)
        levels |= {(router.kind, "equation", both[0]), (router.kind, "adjacent", both[1])}
    return Measured(
        tables=[
            joined("coactivation", exact),
            joined("coactivation_adjacent", adjacent),
            from_rows(
                "coactivation_order", ["kind", "layer", "expert", "strength", "cluster"], orders
            ),
            from_rows("coactivation_random", ["kind", "variant", "value"], sorted(levels)),
        ],
        notes={"values": {router: found.values() for router, found in counts.items()}},
    )


def _pairs(name: str, router: Router, values: np.ndarray) -> Table:
    rows, columns = np.nonzero(~np.eye(len(values), dtype=np.bool_))
    return Table(
        name=name,
        columns={
            "kind": np.repeat(router.kind, len(rows)),
            "layer": np.repeat(np.int32(router.layer), len(rows)),
            "i": rows.astype(np.int32),
            "j": columns.astype(np.int32),
            "value": values[rows, columns],
        },
    )


def measure_domains(collection: Collection, *, layers: Sequence[int] | None = None) -> Measured:
    """Count which experts serve each domain, and where tokens go from layer to layer.

    Args:
        collection: the routing.
        layers: between which the flow of tokens is counted; None takes first, middle and last.
    """
    routers = collection.routers()
    names = collection.manifest.domains
    counts = {router: DomainCounts(len(names), router.num_experts) for router in routers}
    flows = {
        (one, other): JointCounts(one.num_experts, other.num_experts)
        for kind in collection.kinds()
        for one, other in _neighbours(shown_routers(collection, kind, layers))
    }
    columns = [f"{router.name}.experts" for router in routers]
    for arrays in collection.tokens("domain", *columns):
        for router in routers:
            counts[router].add(arrays[f"{router.name}.experts"], arrays["domain"])
        for (one, other), joint in flows.items():
            joint.add(*(arrays[f"{each.name}.experts"][:, :1] for each in (one, other)))
    shares, deviations = [], []
    for router, found in counts.items():
        for k in ks_of(router):
            values = found.shares(first_only=k == 1)
            for domain, name in enumerate(names):
                shares += [
                    (router.kind, router.layer, expert, name, k, float(value))
                    for expert, value in enumerate(values[domain])
                ]
                above = int((values[domain] > 1.5 * k / router.num_experts).sum())
                deviation = float(values[domain].std())
                deviations.append((router.kind, router.layer, name, k, deviation, above))
    return Measured(
        tables=[
            from_rows("domains", ["kind", "layer", "expert", "domain", "k", "share"], shares),
            from_rows(
                "domains_deviation",
                ["kind", "layer", "domain", "k", "standard_deviation", "experts_above_1.5_uniform"],
                deviations,
            ),
            _flow_table(flows),
            _random_levels("domains", collection, lambda experts, k: k / experts),
        ],
        notes={"flows": flows, "counts": counts},
    )


def shown_routers(
    collection: Collection, kind: str, layers: Sequence[int] | None = None
) -> list[Router]:
    """Return the routers of a kind in some layers; None takes first, middle and last.

    Raises:
        DataError: a layer has no such router.
    """
    mine = {router.layer: router for router in collection.routers(kind)}
    if layers is None:
        there = sorted(mine)
        layers = sorted({there[0], there[(len(there) - 1) // 2], there[-1]})
    missing = [layer for layer in layers if layer not in mine]
    if missing:
        raise DataError(
            f"layer {missing[0]} has no {kind} router; layers are counted from 0, and"
            f" {collection.directory} has {', '.join(map(str, sorted(mine)))}; give others"
        )
    return [mine[layer] for layer in layers]


def _neighbours(routers: Sequence[Router]) -> list[tuple[Router, Router]]:
    return list(itertools.pairwise(routers))


def _flow_table(flows: dict[tuple[Router, Router], JointCounts]) -> Table:
    rows = [
        (one.kind, one.layer, int(a), other.layer, int(b), int(joint.together[a, b]))
        for (one, other), joint in flows.items()
        for a, b in zip(*np.nonzero(joint.together), strict=True)
    ]
    columns = ["kind", "from_layer", "from_expert", "to_layer", "to_expert", "tokens"]
    return from_rows("domains_flow", columns, rows)


def measure_load(collection: Collection) -> Measured:
    """Describe how evenly each domain's tokens load the experts."""
    routers = collection.routers()
    names = [*collection.manifest.domains, ALL]
    sums = {router: BalanceSums(len(names) - 1, router.num_experts) for router in routers}
    parts = ("counts", "scores", "entropy")
    columns = [f"{router.name}.{part}" for router in routers for part in parts]
    for arrays in collection.windows("domain", "tokens", *columns):
        for router in routers:
            values = (arrays[f"{router.name}.{part}"] for part in parts)
            sums[router].add(arrays["domain"], arrays["tokens"], *values)
    load, scales = [], []
    for router, found in sums.items():
        whole = _with_all(found)
        loss, window = whole.loss(), whole.mean_window_loss()
        entropy = whole.mean_entropy()
        for domain, name in enumerate(names):
            figures = load_figures(whole.counts[domain])
            load.append(
                (
                    *(router.kind, router.layer, name, float(loss[domain])),
                    *(figures.max_load_ratio, figures.entropy, figures.dead),
                )
            )
            by_scale = (loss[domain], window[domain])
            scales.append(
                (
                    *(router.kind, str(router.layer), name),
                    *(float(value) for value in by_scale),
                    *(float(value) * router.topk for value in by_scale),
                    float(entropy[domain]),
                )
            )
    for kind in collection.kinds():
        of_kind = [_with_all(sums[router]) for router in collection.routers(kind)]
        if len({each.counts.shape for each in of_kind}) == 1:
            topk = collection.routers(kind)[0].topk
            for name, value in zip(names, pooled_loss(of_kind).tolist(), strict=True):
                nan = float("nan")
                scales.append((kind, ALL, name, value, nan, value * topk, nan, nan))
    return Measured(
        tables=[
            from_rows(
                "load",
                [
                    *("kind", "layer", "domain", "load_balancing_loss"),
                    *("max_load_ratio", "entropy", "dead"),
                ],
                load,
            ),
            from_rows(
                "load_scales",
                [
                    *("kind", "layer", "domain", "megablocks", "megablocks_per_window"),
                    *("transformers", "transformers_per_window", "routing_entropy"),
                ],
                scales,
            ),
        ]
    )


def _with_all(sums: BalanceSums) -> BalanceSums:
    """Return the sums with a last domain: all of them together."""
    whole = BalanceSums(len(sums.tokens) + 1, sums.counts.shape[1])
    for name in ("tokens", "counts", "scores", "entropy", "window_loss"):
        values = getattr(sums, name)
        setattr(whole, name, np.concatenate([values, values.sum(axis=0, keepdims=True)]))
    return whole
