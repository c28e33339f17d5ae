"""Runs tasks of the harness on rank 0, and writes what it found."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, sanitize_list

from megatron.trainer.io.atomic_write import atomic_write, write_text
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.harness.preflight import LoadedTasks, explained, load_tasks
from moe_app.evaluate.harness.task_data import local_datasets
from moe_app.evaluate.harness.task_search import find_tasks
from moe_app.evaluate.suites import Suite, asks_in_conversations

logger = logging.getLogger("evaluate")

RESULTS_NAME = "results.json"
_NO_METRICS = ("alias", "name", "sample_len", "samples")


def evaluate_suite(
    model: HarnessModel, suite: Suite, args: argparse.Namespace, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate every task, write samples, and return the results.

    Raises:
        UserError: a task or its data are invalid, or nothing can be written.
    """
    # What it says of every default, and its bars, would hide our lines.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = find_tasks(args.include_path, suite.tasks)
    with local_datasets(None if args.task_data is None else Path(args.task_data)):
        loaded = load_tasks(model, manager, suite.tasks, args.gen_kwargs, seed=args.seed)
        parts = [
            _run_tasks(
                model,
                manager,
                args,
                {name: loaded.pop(name) for name in tasks},  # and let go of it afterwards
                is_chat=asks_in_conversations(args, suite),
                num_fewshot=num_fewshot,
                limit=limit,
            )
            for (num_fewshot, limit), tasks in _grouped(suite, args).items()
        ]
    found = parts[0]
    for other in parts[1:]:
        for key, value in other.items():
            if isinstance(value, dict) and key != "config":
                found.setdefault(key, {}).update(value)
    found["config"].update(info)
    output = Path(args.output)
    samples: Mapping[str, Sequence[dict[str, Any]]] = found.pop("samples")
    for task, each in samples.items():
        _write_samples(output / f"samples_{task}.jsonl", each)
    return found


def write_results(output: Path, found: Mapping[str, Any]) -> None:
    """Write what was found."""
    text = json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_text(output / RESULTS_NAME, text + "\n", durable=True)


def _grouped(
    suite: Suite, args: argparse.Namespace
) -> dict[tuple[int | None, int | None], list[str]]:
    """Group tasks by the examples in their prompts, None leaving them to the task, and by limit."""
    groups: dict[tuple[int | None, int | None], list[str]] = {}
    for task in suite.tasks:
        asked = args.num_fewshot
        number = asked if asked is not None else suite.num_fewshot.get(task)
        limits = [each for each in (args.limit, suite.limits.get(task)) if each is not None]
        groups.setdefault((number, min(limits, default=None)), []).append(task)
    return groups


def _run_tasks(
    model: HarnessModel,
    manager: TaskManager,
    args: argparse.Namespace,
    tasks: LoadedTasks,
    *,
    is_chat: bool,
    num_fewshot: int | None,
    limit: int | None,
) -> dict[str, Any]:
    """Let the harness evaluate some tasks; examples in a conversation are part of the question."""
    with explained([*tasks]):
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=[each for parts in tasks.values() for each in parts],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            gen_kwargs=args.gen_kwargs,
            bootstrap_iters=args.bootstrap_iters,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=False,
            confirm_run_unsafe_code=False,
        )
    return found


def _write_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write one object an item, in the form of the harness's own files."""
    with atomic_write(path, durable=True) as file:
        for sample in samples:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(argument)}
                for i, argument in enumerate(sample["arguments"])
            }
            record = {
                **sample,
                "arguments": arguments,
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "target": str(sample["target"]),
            }
            line = json.dumps(record, default=handle_non_serializable, ensure_ascii=False)
            file.write(line.encode("utf-8", errors="backslashreplace") + b"\n")


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each metric of each task."""
    lines = []
    for task, values in found["results"].items():
        for key, value in values.items():
            if key in _NO_METRICS or "_stderr" in key or not isinstance(value, int | float):
                continue
            metric, _, variant = key.partition(",")
            error = values.get(f"{metric}_stderr,{variant}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            named = metric if variant in ("", "none") else f"{metric} ({variant})"
            lines.append(f"{task}: {named} {value:.4f}{spread}")
    return lines
