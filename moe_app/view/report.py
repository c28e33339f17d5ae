"""Summarise a run: losses against the unigram entropy, speed, expert health.

    python tools/report.py --run runs/quickstart --require-below-entropy

The unigram entropy of a validation set is what a model reaches that knows how often each of its
tokens occurs and nothing else. A loss below it shows that the model uses the context. Exit status:
0, or 1 when --require-below-entropy is given and not met, or 2 when the report cannot be made.
"""

import argparse
import math
import statistics
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.trainer.data.build import build_data
from megatron.trainer.data.entropy import token_counts, unigram_entropy
from megatron.trainer.data.source import MockSource, Source, WindowSource
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.records.history import (
    PlannedEnd,
    Validation,
    planned_end,
    validation_results,
)
from megatron.trainer.records.losses import LOSSES, loss_name
from megatron.trainer.records.perplexity import last_figures
from megatron.trainer.records.record_file import Record, read_records
from megatron.trainer.records.run_dir import CONFIG_NAME, EVENTS_NAME, METRICS_NAME, check_run
from megatron.trainer.records.tasks import SHOWN, TaskResult, task_results
from megatron.trainer.runtime.launch import run_main
from moe_app.command_line import program
from moe_app.pretrain.config import PretrainConfig, read_saved_config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report that `argv` asks for; returns the exit status."""
    args = parse_args(argv)
    return run_main(lambda: run(args))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("report"), description="Say what a run did, from its run directory."
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run's --save directory")
    parser.add_argument(
        "--require-below-entropy",
        action="store_true",
        help="exit with 1 unless every validation loss is below its unigram entropy",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        ConfigError: the directory holds no run.
    """
    directory = Path(args.run)
    check_run(directory, given_as="--run")
    cfg = read_saved_config(directory / CONFIG_NAME, prog=program("report"))
    metrics = read_metrics(directory / METRICS_NAME)
    entropies, problem = validation_entropies(cfg) if metrics.evaluations else ({}, None)
    validation = validation_results(metrics.evaluations, entropies)
    for line in (
        *describe_training(cfg, metrics, planned_end(read_records(directory / EVENTS_NAME))),
        "",
        *describe_validation(validation, problem),
        "",
        *describe_perplexity(last_figures(metrics.evaluations)),
        *describe_tasks(task_results(metrics.evaluations)),
        *describe_files(directory),
    ):
        print(line)
    if not args.require_below_entropy:
        return 0
    verdict, is_met = judge(validation)
    print(f"\n{verdict}")
    return 0 if is_met else 1


@dataclass
class Metrics:
    """Holds what the report needs of `metrics.jsonl`."""

    last: Record | None = None
    """The last step's record; None without one."""
    speeds: "array[float]" = field(default_factory=lambda: array("d"))
    """Tokens per second of all steps' records."""
    evaluations: list[Record] = field(default_factory=list)
    """The evaluations' records."""


def read_metrics(path: Path) -> Metrics:
    """Read `metrics.jsonl`, one record at a time."""
    metrics = Metrics()
    for record in read_records(path):
        if "valid_loss" in record:
            metrics.evaluations.append(record)
        if loss_name(record) is not None:
            metrics.last = record
            metrics.speeds.append(record["tokens_per_second"])
    return metrics


def validation_entropies(cfg: PretrainConfig) -> tuple[dict[str, float], str | None]:
    """Compute the unigram entropy of each validation set of a run, in nats per token.

    Returns:
        The entropies by name, and what kept the data from being read, if anything did. Nothing of a
        run on conversations, whose losses are of some tokens alone.
    """
    if not (cfg.data.data_path or cfg.data.phases or cfg.data.mock_data):
        return {}, None
    try:
        data = build_data(
            cfg.data,
            vocab_size=cfg.model.vocab_size,
            seq_length=cfg.training.seq_length,
            seed=cfg.training.seed,
        )
    except (ConfigError, DataError) as error:
        return {}, str(error)
    entropies = {}
    for name, held_back in data.validation.items():
        entropies[name] = source_entropy(held_back.source, vocab_size=cfg.model.vocab_size)
    return entropies, None


def source_entropy(source: Source, *, vocab_size: int) -> float:
    """Compute the unigram entropy of all tokens of a source, in nats per token.

    Raises:
        TypeError: the source is of a kind that this tool does not know.
    """
    if isinstance(source, MockSource):
        return math.log(source.vocab_size)  # uniform
    if isinstance(source, WindowSource):
        counts = token_counts(
            source.tokens,
            start_token=source.start_token,
            stop_token=source.stop_token,
            vocab_size=vocab_size,
        )
        return unigram_entropy(counts)
    raise TypeError(f"{type(source).__name__} is neither a WindowSource nor a MockSource")


def judge(validation: Sequence[Validation]) -> tuple[str, bool]:
    """Compare every last loss with its set's unigram entropy; returns a message and the result."""
    if not validation:
        return "FAILED: no validation loss to compare with a unigram entropy", False
    missed = [result for result in validation if not result.is_below_entropy]
    if not missed:
        return "PASSED: every validation loss is below its set's unigram entropy", True
    told = "; ".join(
        f"{result.name}: loss {_number(result.last)}, unigram entropy {_number(result.entropy)}"
        for result in missed
    )
    return f"FAILED: validation loss is not below the unigram entropy ({told})", False


def describe_training(
    cfg: PretrainConfig, metrics: Metrics, end: PlannedEnd | None = None
) -> list[str]:
    """Describe progress, training loss, speed and expert health; `end` is as events have it."""
    last, planned = metrics.last, cfg.training.train_iters if end is None else end.train_iters
    if last is None:
        return [
            f"no training record yet (one every {cfg.logging.log_interval} iterations of {planned})"
        ]
    done = last["iteration"]
    speed = statistics.median(metrics.speeds)
    name = loss_name(last) or "lm_loss"
    rows = [
        ["iterations", f"{done:,} of {planned:,}, {last['consumed_tokens']:,} tokens"],
        ["training loss", f"{_number(last[name])} {LOSSES[name]}"],
        ["speed", f"{speed:,.0f} tokens/s, median of {len(metrics.speeds)} records"],
    ]
    rows += _preference_rows(last)
    rows += _source_rows(last)
    if last.get("moe_max_load_ratio") is not None:
        rows += _expert_rows(cfg, last)
    return _table(rows)


def describe_validation(validation: Sequence[Validation], problem: str | None) -> list[str]:
    """Tabulate losses and unigram entropies, in nats per token."""
    if not validation:
        return ["validation      none: the run has no validation set, or did not evaluate yet"]
    rows = [["validation", "last loss", "best loss", "unigram entropy", "difference", ""]]
    for result in validation:
        difference = None
        if result.last is not None and result.entropy is not None:
            difference = result.last - result.entropy
        best = _number(result.best)
        if result.best_iteration is not None:
            best += f" at {result.best_iteration:,}"
        verdict = "below" if result.is_below_entropy else "NOT below"
        rows.append(
            [
                result.name,
                _number(result.last),
                best,
                _number(result.entropy),
                _number(difference, sign="+"),
                "" if difference is None else verdict,
            ]
        )
    lines = _table(rows)
    if problem is not None:
        lines.append(f"unigram entropy is not known: {problem}")
    return lines


def describe_perplexity(
    figures: Mapping[str, tuple[float | None, float | None]],
) -> list[str]:
    """Tabulate perplexities and bits per byte, with an empty line below; nothing without them."""
    if not figures:
        return []
    rows = [["validation", "perplexity", "bits per byte"]]
    rows += [[name, *map(_number, pair)] for name, pair in figures.items()]
    return [*_table(rows), ""]


def describe_tasks(tasks: Sequence[TaskResult]) -> list[str]:
    """Tabulate the tasks' scores, with an empty line below them; nothing without tasks."""
    if not tasks:
        return []
    names = list(dict.fromkeys(name for each in tasks for name in each.accuracy))
    rows = [["task accuracy", *names, f"best {SHOWN}", "bits per byte"]]
    for task in tasks:
        best = _share(task.best)
        if task.best_iteration is not None:
            best += f" at {task.best_iteration:,}"
        shares = [_share(task.accuracy.get(name)) for name in names]
        rows.append([task.name, *shares, best, _number(task.bits_per_byte)])
    return [*_table(rows), ""]


def describe_files(directory: Path) -> list[str]:
    """List the paths of a run's existing files."""
    names = {
        "run directory": ".",
        "metrics": METRICS_NAME,
        "loss plot": "plots/loss.png",
        "rate plot": "plots/learning_rate.png",
        "source plot": "plots/sources.png",
        "preferences": "plots/preferences.png",
        "task plot": "plots/tasks.png",
        "byte plot": "plots/bits_per_byte.png",
        "expert load": "plots/expert_load.png",
        "TensorBoard": "tensorboard",
    }
    return _table(
        [[label, str(directory / name)] for label, name in names.items() if _is(directory, name)]
    )


def _is(directory: Path, name: str) -> bool:
    return (directory / name).exists()


def _source_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Describe the tokens per source, if there are several."""
    tokens = record.get("consumed_tokens_per_source", {})
    if len(tokens) < 2:
        return []
    told = ", ".join(
        f"{name} {count:,} ({count / record['consumed_tokens']:.1%})"
        for name, count in tokens.items()
    )
    return [["tokens from", told]]


def _preference_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Describe the rewards of the last record's global batch, in alignment."""
    if "rewards_chosen" not in record:
        return []
    chosen, rejected, margin, accuracy = (
        record.get(f"rewards_{name}") for name in ("chosen", "rejected", "margin", "accuracy")
    )
    met = "not known" if accuracy is None else f"{accuracy:.1%}"
    return [
        [
            "rewards",
            f"chosen {_number(chosen)}, rejected {_number(rejected)}, margin {_number(margin)}",
        ],
        ["preferences", f"{met} met in the last batch"],
    ]


def _expert_rows(cfg: PretrainConfig, record: Mapping[str, Any]) -> list[list[str]]:
    """Describe the expert load in the last record's global batch."""
    ratios = [ratio or 0.0 for ratio in record["layer_max_load_ratio"]]
    worst = max(range(len(ratios)), key=lambda layer: ratios[layer])
    total = cfg.model.num_moe_layers * (cfg.model.num_experts or 0)
    return [
        ["busiest expert", f"{ratios[worst]:.2f} x an even share, in layer {worst + 1}"],
        ["dead experts", f"{record['moe_dead_experts']:.0f} of {total:,} in the last batch"],
    ]


def _number(value: float | None, sign: str = "") -> str:
    return "not known" if value is None else f"{value:{sign}.4f}"


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1%}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to their longest entry, the first at least to the labels."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = max(widths[0], 14)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
