"""Runs stages on a cluster: as SLURM arrays that wait for each other, or on Ray.

datatrove's SLURM executor hands itself to its tasks as a pickle, which they would execute. Ours
starts this command again in each task, which reads plan.json and builds its stage from it.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datatrove.executor.ray import RayPipelineExecutor
from datatrove.utils.stats import PipelineStats

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import write_text
from moe_app.filter.pipeline.executors import LocalExecutor, quiet
from moe_app.filter.pipeline.near_duplicates import local_folder
from moe_app.filter.pipeline.stages import FilterStage
from moe_app.filter.submissions import (
    Submission,
    add_job,
    begin_submission,
    read_ranks,
    write_ranks,
)
from moe_app.filter.work_folder import WorkFolder
from moe_app.slurm.jobs import submit

_MOST_JOBS = 1000
"""Of one array; SLURM's default of MaxArraySize allows one more."""


def tasks_per_job(stage: FilterStage, jobs: int | None) -> int:
    """Return how many tasks of a stage each job of at most `jobs` takes; None for one each."""
    return math.ceil(stage.tasks / min(jobs or _MOST_JOBS, _MOST_JOBS))


def run_share(
    stage: FilterStage, folder: WorkFolder, *, submission: str, share: int, jobs: int | None
) -> None:
    """Run, inside an element of a SLURM array, the tasks of a stage that are its share.

    Args:
        stage: The stage.
        folder: Where it works.
        submission: What the array was submitted with.
        share: The element's place in the array.
        jobs: Jobs of the array at most, as when it was submitted.

    Raises:
        DataError: A later submission does this work.
        UserError: As the steps.
    """
    ranks = read_ranks(folder, stage.name, submission)
    count = tasks_per_job(stage, jobs)
    executor = _executor(stage, folder)
    for rank in ranks[share * count : (share + 1) * count]:
        executor.run_task(rank)


def _executor(stage: FilterStage, folder: WorkFolder) -> LocalExecutor:
    logs = local_folder(folder.stage(stage.name))
    return LocalExecutor(list(stage.steps), tasks=stage.tasks, logging_dir=logs)


def parse_slurm(settings: Sequence[str]) -> dict[str, str]:
    """Read options of sbatch, written NAME=VALUE, or NAME= for one without a value.

    Raises:
        ConfigError: One is none, or would be more than one line of a script.
    """
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not equals or not value.isprintable():
            raise ConfigError(
                f"--slurm {setting!r} is no option of sbatch; write NAME=VALUE, such as"
                " partition=cpu or time=12:00:00"
            )
        found[name] = value
    return found


def submit_stages(
    stages: Sequence[FilterStage],
    folder: WorkFolder,
    *,
    jobs: int | None,
    workers: int | None,
    options: Mapping[str, str],
) -> dict[str, str]:
    """Submit an array for each stage that is not done, each after the one before.

    No job of an earlier submission may be queued: `refuse_queued`.

    Args:
        stages: All stages, in order.
        folder: Where they work, on a file system of all nodes.
        jobs: Jobs of an array; None for one a task.
        workers: How many of them run at the same time; None for any number.
        options: Of sbatch.

    Returns:
        The job of each stage that was submitted.

    Raises:
        DataError: Another command submits the same stages.
        SlurmError: sbatch is not there, or refuses.
    """
    submission = None
    before = ""
    for stage in stages:
        missing = _executor(stage, folder).get_incomplete_ranks()
        if not missing:
            continue
        submission = submission or begin_submission(folder)
        place = folder.stage(stage.name)
        write_ranks(folder, stage.name, submission, missing)
        elements = math.ceil(len(missing) / tasks_per_job(stage, jobs))
        array = f"0-{elements - 1}" + (f"%{workers}" if workers else "")
        settings = {
            "job-name": f"filter-{stage.name}",
            "output": str(place / "slurm-%A_%a.log"),
            **options,
            "array": array,
        }
        if before:
            settings |= {"dependency": f"afterok:{before}", "kill-on-invalid-dep": "yes"}
        command = _command(stage, folder, submission, jobs)
        script = place / f"array-{submission.name}.sbatch"
        write_text(script, _script(settings, command))
        before = submit(script)
        submission = add_job(folder, submission, stage.name, before)
    return submission.jobs if submission else {}


def _command(
    stage: FilterStage, folder: WorkFolder, submission: Submission, jobs: int | None
) -> str:
    """Return what an element of an array runs."""
    command = [sys.executable, "-m", "moe_app", "filter", "--output", str(folder.output)]
    command += ["--run-stage", stage.name, "--submission", submission.name]
    command += ["--tasks", str(jobs)] if jobs else []
    return f'{shlex.join(command)} --share "$SLURM_ARRAY_TASK_ID"'


def _script(settings: Mapping[str, str], command: str) -> str:
    directives = "".join(
        f"#SBATCH --{name}{f'={shlex.quote(value)}' if value else ''}\n"
        for name, value in settings.items()
    )
    return f"#!/bin/bash\n{directives}set -eu\nexec {command}\n"


class RayExecutor(RayPipelineExecutor):
    """Runs the tasks of a stage on a Ray cluster."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with quiet():
            return super()._run_for_rank(rank, local_rank, node_rank)


def run_on_ray(
    stages: Sequence[FilterStage], folder: WorkFolder, *, jobs: int | None, workers: int | None
) -> None:
    """Run what is missing of all stages on the Ray cluster of this node, or on a new local one.

    Raises:
        ConfigError: Ray is not installed.
        DataError: A task failed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            "ray is not installed; --executor ray needs it; install it with pip install"
            " 'megatron-moe[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    for stage in stages:
        with quiet():
            executor = RayExecutor(
                list(stage.steps),
                tasks=stage.tasks,
                workers=workers or -1,
                tasks_per_job=tasks_per_job(stage, jobs),
                mem_per_cpu_gb=0,
                logging_dir=local_folder(folder.stage(stage.name)),
            )
            executor.run()
        missing = executor.get_incomplete_ranks()
        if missing:
            log = folder.stage(stage.name) / "logs" / f"task_{missing[0]:05d}.log"
            raise DataError(
                f"{stage.name}: {len(missing)} of {stage.tasks} tasks failed, first task"
                f" {missing[0]}: {_last_error(log)}; mend it and start again (its log is {log})"
            )


def _last_error(log: Path) -> str:
    """Return the last line of a log that names an error."""
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    found = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return found[-1] if found else "its log names no error"
