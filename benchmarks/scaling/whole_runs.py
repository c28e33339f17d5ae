"""Models the papers' whole pretraining runs, and the same on more GPUs: time, cost, lost nodes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_app.planner.plan import parse
from moe_app.planner.search import Plan, memory_limit, search, stage_seconds

FAILURES_PER_GPU_HOUR = 419 / (16384 * 54 * 24)
"""Unexpected interruptions of 16,384 H100 in 54 days: Llama 3, arXiv 2407.21783, section 3.3.4."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Holds a paper's run."""

    preset: str
    """Name of its architecture."""
    tokens: float
    """Tokens that it trained on."""
    gpus: int
    """GPUs that it ran on."""
    sequences: int
    """Of a micro-batch."""
    rate: float
    """Tokens per second and GPU."""
    source: str
    """Where the rate is from."""


PAPERS = (
    Published(
        preset="olmoe_1b_7b",
        tokens=5.133e12,
        gpus=256,
        sequences=4,
        rate=23600,
        source="OLMoE, section 4.1.1: 128 H100",
    ),
    Published(
        preset="jetmoe_8b",
        tokens=1.25e12,
        gpus=96,
        sequences=1,
        rate=1.25e12 / (30000 * 3600),
        source="JetMoE, abstract: 1.25T tokens in 30,000 H100 hours",
    ),
)
LARGER: Sequence[tuple[int, int]] = ((1024, 1024), (8192, 1024), (10240, 5120))
"""GPUs, and sequences of a global batch, of which each model is planned too."""

SEARCHED = (
    *("--tp", "1", "2", "4", "8", "--vp", "1", "--ep", "1", "--etp", "1"),
    *("--distributed-optimizer", "on"),
)
"""Layouts that are planned: no experts away from their tokens, as in both papers."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Says what a lost node costs."""

    restart_s: float
    """Seconds from the failure until the last checkpoint is loaded."""
    save_s: float
    """Seconds that training stands still for a save."""

    def interval_s(self, num_gpus: int) -> float:
        """Return the time between saves that loses least (Young, 1974)."""
        return math.sqrt(2 * self.save_s * mean_time_between(num_gpus))

    def share(self, num_gpus: int) -> float:
        """Return the share of time lost to saves, restarts and steps taken twice."""
        interval = self.interval_s(num_gpus)
        lost = self.restart_s + interval / 2
        return self.save_s / interval + lost / mean_time_between(num_gpus)


def mean_time_between(num_gpus: int) -> float:
    """Return the mean seconds between failures."""
    return 3600 / (FAILURES_PER_GPU_HOUR * num_gpus)


def rows(flags: Sequence[str], losses: Losses, dollars: float) -> list[dict[str, Any]]:
    """Describe each paper's run and the larger ones under the fastest layout that fits.

    Args:
        flags: of `tools/plan.py`: rates and memory of a GPU.
        losses: what a lost node costs.
        dollars: for a GPU hour.
    """
    return [
        describe(paper, num_gpus, sequences, flags, losses, dollars)
        for paper in PAPERS
        for num_gpus, sequences in ((paper.gpus, 1024), *LARGER)
    ]


def describe(
    paper: Published,
    num_gpus: int,
    sequences: int,
    flags: Sequence[str],
    losses: Losses,
    dollars: float,
) -> dict[str, Any]:
    """Plan one run; without a layout that fits it says so.

    Raises:
        ConfigError: a flag is wrong.
    """
    of_micro_batch = paper.sequences if num_gpus == paper.gpus else 1
    cfg, _ = parse(
        [
            *("--preset", paper.preset, "--gpus", str(num_gpus)),
            *("--global-batch-size", str(sequences), "--micro-batch-size", str(of_micro_batch)),
            *("--bf16", "--overlap-grad-reduce", *SEARCHED, *flags),
        ]
    )
    row: dict[str, Any] = {
        "preset": paper.preset,
        "gpus": num_gpus,
        "batch_tokens": sequences * cfg.training.seq_length,
        "published": paper.rate if num_gpus == paper.gpus else None,
        "source": paper.source,
    }
    plans = search(cfg, num_gpus).plans
    if not plans or not plans[0].fits(memory_limit(cfg.planning)):
        return {**row, "layout": None}
    best = plans[0]
    seconds = stage_seconds(cfg, best.layout, best.step)
    rate = row["batch_tokens"] / best.seconds / num_gpus
    share = losses.share(num_gpus)
    days = paper.tokens / (rate * num_gpus) / 86400 / (1 - share)
    exchanges = {term: value for term, value in seconds.items() if term != "compute"}
    return {
        **row,
        "layout": _layout(best),
        "memory_gb": best.footprint.peak / 1e9,
        "step_seconds": best.seconds,
        "seconds": seconds,
        "rate": rate,
        "limit": max(exchanges, key=lambda term: exchanges[term]),
        "limit_share": max(exchanges.values()) / best.seconds,
        "days": days,
        "gpu_hours": days * 24 * num_gpus,
        "dollars": days * 24 * num_gpus * dollars,
        "hours_between_failures": mean_time_between(num_gpus) / 3600,
        "save_minutes": losses.interval_s(num_gpus) / 60,
        "lost_share": share,
    }


def _layout(plan: Plan) -> str:
    layout = plan.layout
    sizes = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "CP": layout.context,
        "EP": layout.expert,
        "DP": layout.data,
    }
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format a Markdown table, a row per run."""
    lines = [
        "| model | GPUs | tokens a step | layout | tokens/s a GPU | published | largest exchange,"
        " share of the step | days | GPU hours | $ | hours between failures | minutes between"
        " saves | lost |",
        "|---|---:|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        start = f"| {row['preset']} | {row['gpus']:,} | {row['batch_tokens'] / 1e6:.1f}M |"
        if row["layout"] is None:
            lines.append(f"{start} none fits |" + " |" * 9)
            continue
        published = "" if row["published"] is None else f"{row['published']:,.0f}"
        lines.append(
            f"{start} {row['layout']} | {row['rate']:,.0f} | {published} |"
            f" {row['limit']}, {row['limit_share']:.0%} | {row['days']:.1f} |"
            f" {row['gpu_hours']:,.0f} | {row['dollars'] / 1e3:,.0f}k |"
            f" {row['hours_between_failures']:.1f} | {row['save_minutes']:.0f} |"
            f" {row['lost_share']:.1%} |"
        )
    return "\n".join(lines)
