"""What a run will do, told before it does it: its learning-rate schedule and its data."""

from collections.abc import Sequence
from typing import Any

from megatron.trainer.config import RunConfig
from megatron.trainer.data.build import DataBundle, describe, repeated_sources
from megatron.trainer.errors import ConfigError
from moe_ext.schedules import Anneal, Schedule


def build_schedule(cfg: RunConfig) -> Schedule | Anneal:
    """The learning rate; that of a branch as if it began with `lr`, which `resume` corrects.

    Raises:
        ConfigError: the shape is unknown, or its parts do not fit together.
    """
    optimizer = cfg.optimizer
    if cfg.checkpoint.anneal_from is not None:
        return anneal_schedule(cfg, optimizer.lr)
    try:
        return Schedule(
            style=optimizer.lr_decay_style,
            peak=optimizer.lr,
            final=optimizer.min_lr,
            warmup_iters=optimizer.lr_warmup_iters,
            warmup_init=optimizer.lr_warmup_init,
            decay_iters=optimizer.lr_decay_iters or cfg.training.train_iters,
            tail=optimizer.lr_wsd_decay_style,
            tail_iters=optimizer.lr_wsd_decay_iters or 0,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def anneal_schedule(cfg: RunConfig, rate: float) -> Anneal:
    """The schedule of a branch that begins with the learning rate `rate`.

    Raises:
        ConfigError: its tail cannot begin there.
    """
    start, optimizer = cfg.checkpoint.anneal_from, cfg.optimizer
    style, steps = optimizer.lr_wsd_decay_style, optimizer.lr_wsd_decay_iters
    assert start is not None and style is not None and steps is not None  # `validate` saw to it
    try:
        return Anneal(start=start, peak=rate, final=optimizer.min_lr, tail=style, tail_iters=steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def data_lines(cfg: RunConfig, data: DataBundle) -> tuple[list[str], list[str]]:
    """The table of phases and sources, and a warning for each source that is repeated."""
    steps = cfg.training.train_iters - (cfg.checkpoint.anneal_from or 0)
    rows = describe(data, train_samples=steps * cfg.training.global_batch_size)
    return data_table(rows, seq_length=cfg.training.seq_length), repeated_sources(rows)


def data_table(rows: Sequence[dict[str, Any]], *, seq_length: int) -> list[str]:
    """One line per phase and token source; what a source cannot know is left out."""
    formats = {
        "weight": "weight {:.3g}",
        "documents": "{:,} documents",
        "tokens": "{:,} tokens",
        "windows": "{:,} sequences",
        "drawn": "{:,.0f} tokens to be drawn",
        "epochs": "{:.3g} epochs",
    }
    lines = []
    for row in rows:
        drawn = None if row["draw"] is None else row["draw"] * seq_length
        cells = {**row, "drawn": drawn}
        known = [text.format(cells[key]) for key, text in formats.items() if cells[key] is not None]
        where = "" if row["phase"] is None else f"{row['phase']}, "
        lines.append(
            f"{row['use']} data {where}{row['source']}: {', '.join(known) or 'random tokens'}"
        )
    return lines
