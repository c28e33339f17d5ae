"""Write collections of random routing, and keep them as plain lists for comparison."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_app.analyze.capture import RouterPart, ShardPart
from moe_app.analyze.manifest import Manifest, Router
from moe_app.analyze.shard_writer import ShardWriter
from moe_app.analyze.texts import Window

DOMAINS = ("code", "docs")
VOCAB = 11
LENGTH = 16


@dataclass
class Truth:
    """Holds every token of a collection as plain values."""

    domains: list[str] = field(default_factory=list)
    words: dict[str, list[int]] = field(
        default_factory=lambda: {"input": [], "predicted": [], "ground_truth": []}
    )
    experts: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)
    windows: list[tuple[str, int]] = field(default_factory=list)
    """Domain and tokens of each."""
    scores: dict[tuple[str, int], list[list[float]]] = field(default_factory=dict)
    """Probabilities of each token."""


def routers(num_experts: int = 6, topk: int = 2, layers: int = 2) -> tuple[Router, ...]:
    return tuple(
        Router(kind=kind, layer=layer, num_experts=num_experts, topk=topk)
        for layer in range(layers)
        for kind in ("moa", "moe")
    )


def settings(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "source": "runs/gone/iter_0000005",
        "source_kind": "native",
        "model_hash": "0" * 64,
        "iteration": 5,
        "consumed_tokens": 5000,
        "precision": "fp32",
        "vocab_size": VOCAB,
        "routers": routers(),
        "domains": DOMAINS,
        "paths": ("a.jsonl", "b.jsonl"),
        "seq_length": LENGTH,
        "tokens_per_domain": 0,
        "shard_tokens": 64,
    }
    return Manifest(**{**values, **changes})


def write_collection(
    directory: Path, *, seed: int = 1, text_seed: int = 0, finish: bool = True, **changes: Any
) -> Truth:
    """Write a collection in three shards; texts depend on `text_seed`, routing on `seed`."""
    manifest = settings(**changes)
    text, rng, truth = random.Random(text_seed), random.Random(seed), Truth()
    writer = ShardWriter(directory, manifest)
    for lengths in ((16, 16, 9), (16, 16), (16, 3)):
        windows = [
            Window(
                domain=int(text.random() < 0.3),
                # Id 10 never occurs.
                tokens=np.array([text.choice([0, 0, 0, *range(10)]) for _ in range(n)], np.int32),
                following=text.choice([-1, 4]),
            )
            for n in lengths
        ]
        part = ShardPart(windows=list(range(len(windows))))
        for window in windows:
            _add(part, window, manifest, rng, truth)
        writer.write(windows, [part])
    if finish:
        writer.finish()
    return truth


def _add(
    part: ShardPart, window: Window, manifest: Manifest, rng: random.Random, truth: Truth
) -> None:
    count, domain = len(window.tokens), manifest.domains[window.domain]
    predicted = [rng.randrange(10) for _ in range(count)]
    part.predicted.append(np.array(predicted, np.int32))
    truth.domains += [domain] * count
    truth.windows.append((domain, count))
    truth.words["input"] += window.tokens.tolist()
    truth.words["predicted"] += predicted
    truth.words["ground_truth"] += [*window.tokens.tolist()[1:], window.following]
    for router in manifest.routers:
        name = (router.kind, router.layer)
        scores, chosen = [], []
        for _ in range(count):
            weights = [rng.random() + 2 * (expert == 0) for expert in range(router.num_experts)]
            if router.topk < router.num_experts:
                weights[-1] = 0.0  # the last expert serves none where it need not
            scores.append([weight / sum(weights) for weight in weights])
            order = sorted(range(router.num_experts), key=lambda expert: -scores[-1][expert])
            chosen.append(order[: router.topk])
        experts = np.array(chosen, np.int16)
        mine = part.routers.setdefault(name, RouterPart())
        mine.experts.append(experts)
        gates = np.take_along_axis(np.array(scores), experts.astype(int), axis=1)
        mine.gates.append(gates.astype(np.float32))
        counts = np.bincount(experts.ravel(), minlength=router.num_experts)
        mine.counts.append(counts.astype(np.int32))
        mine.scores.append(np.sum(scores, axis=0))
        mine.entropy.append(float(-sum(p * np.log(p) for row in scores for p in row if p)))
        truth.experts.setdefault(name, []).extend(chosen)
        truth.scores.setdefault(name, []).extend(scores)
