"""Turns collections into the numbers of vocabulary specialization."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.trainer.errors import ConfigError
from moe_app.analyze.collection import Collection
from moe_app.analyze.manifest import Router
from moe_app.analyze.measures import Measured, ks_of, shown_routers
from moe_app.analyze.tables import from_rows
from moe_ext.analysis.arrays import Counts
from moe_ext.analysis.vocabulary import (
    VocabularyCounts,
    expert_means,
    mean_specialization,
    random_mean,
)

VARIANTS = {"input": "input", "predicted": "predicted", "ground_truth": "next"}
"""What an expert may specialise in, and its column."""
RELEASED = "_released"
"""Ends the names of variants as OLMoE's released script has them: shares of an id's tokens, and
ids however rare."""
NUM_TOKENS = 10
"""Rows of an expert in the table of tokens."""
HISTOGRAM_MINIMUM = 8
"""Tokens of an id that figure 32 asks for."""
NUM_BINS = 20
_COUNTERS = 1 << 24
"""Numbers that are held at a time; more variants mean another pass."""


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Holds rows of the tables while they grow."""

    means: list[tuple[object, ...]]
    experts: list[tuple[object, ...]]
    tokens: list[tuple[object, ...]]
    levels: list[tuple[object, ...]]
    drawn: dict[tuple[object, ...], float] = field(default_factory=dict)
    """Random levels by what they depend on: input and ground truth are alike in all layers."""


def measure_vocabulary(
    collection: Collection, *, min_count: int = 10, experts: Sequence[int] | None = None
) -> Measured:
    """Count which experts serve each token id: as input, as prediction and as what follows.

    Args:
        collection: the routing.
        min_count: tokens that an id must have.
        experts: of the histograms by domain; None takes 0, 4 and 7, as the paper does. A kind of
            router shows those that it has.

    Raises:
        ConfigError: no router has such an expert.
    """
    _check_experts(collection, experts or ())
    words = _Words(means=[], experts=[], tokens=[], levels=[])
    texts = collection.token_texts()
    for router in collection.routers():
        for variants in _passes(collection, router):
            for variant, counts in _count(collection, router, variants).items():
                _add(words, router, variant, counts, min_count, texts)
    head = ["kind", "layer", "k", "variant"]
    return Measured(
        tables=[
            from_rows("vocabulary", [*head, "mean"], words.means),
            from_rows("vocabulary_experts", [*head, "expert", "mean", "ids"], words.experts),
            from_rows(
                "vocabulary_tokens",
                [
                    *("kind", "layer", "variant", "expert", "rank"),
                    *("token_id", "token", "share", "occurrences"),
                ],
                words.tokens,
            ),
            from_rows("vocabulary_random", [*head, "mean"], words.levels),
            from_rows(
                "vocabulary_histogram",
                ["kind", "layer", "domain", "expert", "from", "to", "percent"],
                _histograms(collection, experts),
            ),
        ],
        notes={"min_count": min_count},
    )


def _check_experts(collection: Collection, experts: Sequence[int]) -> None:
    size = max(router.num_experts for router in collection.routers())
    wrong = next((expert for expert in experts if not 0 <= expert < size), None)
    if wrong is not None:
        raise ConfigError(
            f"--experts names expert {wrong}, but a layer of {collection.directory} has {size},"
            f" counted from 0; give numbers from 0 to {size - 1}"
        )


def _passes(collection: Collection, router: Router) -> list[list[str]]:
    """Divide the variants into passes of bounded memory."""
    size = collection.manifest.vocab_size * router.num_experts
    names = list(VARIANTS)
    step = max(1, _COUNTERS // size)
    return [names[start : start + step] for start in range(0, len(names), step)]


def _count(
    collection: Collection, router: Router, variants: Sequence[str]
) -> dict[str, VocabularyCounts]:
    counts = {
        variant: VocabularyCounts(collection.manifest.vocab_size, router.num_experts)
        for variant in variants
    }
    chosen = f"{router.name}.experts"
    columns = [VARIANTS[variant] for variant in variants]
    for arrays in collection.tokens(chosen, *columns):
        for variant in variants:
            counts[variant].add(arrays[VARIANTS[variant]], arrays[chosen])
    return counts


def _add(
    words: _Words,
    router: Router,
    variant: str,
    counts: VocabularyCounts,
    min_count: int,
    texts: list[str] | None,
) -> None:
    for k in ks_of(router):
        head = (router.kind, router.layer, k)
        first = k == 1
        best, values = counts.best(first_only=first, per_routing=True, min_count=min_count)
        words.means.append((*head, variant, mean_specialization(values)))
        _, released = counts.best(first_only=first, per_routing=False, min_count=1)
        words.means.append((*head, f"{variant}{RELEASED}", mean_specialization(released)))
        for name, least, scale in ((variant, min_count, k), (f"{variant}{RELEASED}", 1, 1)):
            there = counts.occurrences[counts.frequent(least)]
            level = _random_level(words, there, router.num_experts, k)
            words.levels.append((*head, name, level / scale))
        means, numbers = expert_means(best, values, num_experts=router.num_experts)
        words.experts.extend(
            (*head, variant, expert, float(means[expert]), int(numbers[expert]))
            for expert in range(router.num_experts)
        )
    words.tokens.extend(_top_tokens(router, variant, counts, min_count, texts))


def _random_level(words: _Words, occurrences: Counts, num_experts: int, topk: int) -> float:
    key = (np.sort(occurrences).tobytes(), num_experts, topk)
    if key not in words.drawn:
        words.drawn[key] = random_mean(occurrences, num_experts, topk)
    return words.drawn[key]


def _top_tokens(
    router: Router,
    variant: str,
    counts: VocabularyCounts,
    min_count: int,
    texts: list[str] | None,
) -> list[tuple[object, ...]]:
    """Return each expert's most specialised tokens, for the first expert of a token."""
    frequent = counts.frequent(min_count)
    rows: list[tuple[object, ...]] = []
    for expert in range(router.num_experts):
        ids = frequent[counts.first[frequent, expert] > 0]
        mine = counts.first[ids, expert] / counts.occurrences[ids]
        # The more frequent one of equals first: it says more.
        order = np.lexsort((ids, -counts.occurrences[ids], -mine))[:NUM_TOKENS]
        for rank, at in enumerate(order):
            token, share = int(ids[at]), float(mine[at])
            text = str(token) if texts is None else texts[token]
            occurrences = int(counts.occurrences[token])
            rows.append(
                (
                    *(router.kind, router.layer, variant, expert, rank),
                    *(token, text, share, occurrences),
                )
            )
    return rows


def _histograms(collection: Collection, experts: Sequence[int] | None) -> list[tuple[object, ...]]:
    """Return how the shares of a domain's ids are spread, for some experts of the last layers."""
    rows: list[tuple[object, ...]] = []
    for kind in collection.kinds():
        router = shown_routers(collection, kind)[-1]
        wanted = dict.fromkeys(experts or (0, 4, 7))
        chosen = [each for each in wanted if each < router.num_experts]
        for domain, name in enumerate(collection.manifest.domains):
            counts = VocabularyCounts(collection.manifest.vocab_size, router.num_experts)
            column = f"{router.name}.experts"
            for arrays in collection.tokens("domain", "input", column):
                mine = arrays["domain"] == domain
                counts.add(arrays["input"][mine], arrays[column][mine])
            ids = counts.frequent(HISTOGRAM_MINIMUM)
            shares = counts.specialization(first_only=False, per_routing=False, ids=ids)
            for expert in chosen:
                found, edges = np.histogram(shares[:, expert], bins=NUM_BINS, range=(0, 1))
                percent = 100 * found / max(1, len(ids))
                rows += [
                    (kind, router.layer, name, expert, float(low), float(high), float(value))
                    for low, high, value in zip(edges[:-1], edges[1:], percent, strict=True)
                ]
    return rows
