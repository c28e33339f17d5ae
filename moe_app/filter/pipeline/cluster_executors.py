"""Runs stages on a cluster: as SLURM arrays that wait for each other, or on Ray.

datatrove's SLURM executor hands itself to its tasks as a pickle, which they would execute. Ours
starts this command again in each task, which reads plan.json and builds its stage from it.
"""

import math
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

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

_CPU_WAIT_S = 300.0
_RETRIES = 3
"""Of a share whose process or node was lost; an error of a task is not tried again."""
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


def run_on_ray(
    stages: Sequence[FilterStage], folder: WorkFolder, *, jobs: int | None, workers: int | None
) -> None:
    """Run what is missing of all stages on the Ray cluster of this node, or on a new local one.

    datatrove's Ray executor hands its tasks over in a thread, and waits without end for what that
    thread was to hand over if anything fails there. Ours hands them over itself.

    Raises:
        ConfigError: Ray is not installed, or its cluster has no CPU.
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
    _wait_for_cpus(ray)
    for stage in stages:
        executor = _executor(stage, folder)
        with quiet():
            missing = executor.get_incomplete_ranks()
        count = tasks_per_job(stage, jobs)
        shares = [missing[first : first + count] for first in range(0, len(missing), count)]
        errors = _run_shares(ray, executor, shares, at_once=workers or len(shares))
        if errors:
            first = min(errors)
            raise DataError(
                f"{stage.name}: {len(errors)} of {stage.tasks} tasks failed, first task {first}:"
                f" {errors[first]}; mend it and start again (logs are in"
                f" {folder.stage(stage.name) / 'logs'})"
            )


def _wait_for_cpus(ray: Any) -> None:
    """Wait until the cluster, which may have to start nodes first, has a CPU for a task.

    Raises:
        ConfigError: It gets none.
    """
    end = time.monotonic() + _CPU_WAIT_S
    while ray.cluster_resources().get("CPU", 0) < 1:
        if time.monotonic() > end:
            raise ConfigError(
                f"the Ray cluster had no CPU for {_CPU_WAIT_S:g} s, and each task needs one; add"
                " nodes to it, or use --executor local"
            )
        time.sleep(0.2)


def _run_shares(
    ray: Any, executor: LocalExecutor, shares: Sequence[Sequence[int]], *, at_once: int
) -> dict[int, str]:
    """Run tasks on the cluster, a share of them in each of its processes.

    Args:
        ray: The module.
        executor: Of the stage.
        shares: Of its tasks.
        at_once: Shares that run at the same time, at most.

    Returns:
        What went wrong, by task.
    """
    run = ray.remote(num_cpus=1, max_retries=_RETRIES)(run_ranks)
    steps = ray.put(executor)
    queued = list(reversed(shares))
    running: dict[Any, Sequence[int]] = {}
    errors: dict[int, str] = {}
    try:
        while queued or running:
            while queued and len(running) < at_once:
                share = queued.pop()
                running[run.remote(steps, list(share))] = share
            (done,), _ = ray.wait(list(running))
            share = running.pop(done)
            try:
                errors |= ray.get(done)
            except ray.exceptions.RayError as error:  # a process or node that was lost, say
                errors |= dict.fromkeys(share, _one_line(error))
    finally:
        for each in running:
            ray.cancel(each, force=True)
    return errors


def run_ranks(executor: LocalExecutor, ranks: Sequence[int]) -> dict[int, str]:
    """Run tasks one after the other, in a process of a cluster; return what went wrong, by task."""
    errors = {}
    for rank in ranks:
        try:
            executor.run_task(rank)
        except Exception as error:  # it ends the command, which says so; the other tasks stay done
            errors[rank] = _one_line(error)
    return errors


def _one_line(error: Exception) -> str:
    """Return the name of an error and the last line of what it says, which names the cause."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'it says no more'}"
