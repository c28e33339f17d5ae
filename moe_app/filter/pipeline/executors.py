"""Runs stages with datatrove's executors."""

import contextlib
import copy
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from megatron.trainer.errors import DataError
from moe_app.filter.pipeline.near_duplicates import local_folder
from moe_app.filter.pipeline.stages import FilterStage
from moe_app.filter.work_folder import WorkFolder


class _Nowhere(io.TextIOBase):
    """Takes what datatrove prints; its log files hold the same."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep datatrove's log off the terminal, here and after it sets its logger up again."""
    logger.remove()
    with contextlib.redirect_stderr(_Nowhere()):
        yield


def end_with_parent() -> None:
    """End this worker process when the one that started it is gone, killed for example."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


class LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks of a stage in processes of this machine."""

    def run_task(self, rank: int) -> None:
        """Run one task with steps of its own.

        Raises:
            UserError: As the steps.
        """
        steps: list[PipelineStep] = self.pipeline
        self.pipeline: list[PipelineStep] = copy.deepcopy(steps)
        try:
            self._run_for_rank(rank)
        finally:
            self.pipeline = steps

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with quiet():
            return super()._run_for_rank(rank, local_rank, node_rank)


class TaskProcesses:
    """Runs tasks in worker processes, which all stages share; without any, in this process.

    datatrove's pool waits without end for a task whose process was killed; this one says so.
    """

    def __init__(self, count: int) -> None:
        self._others = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(count, context, initializer=end_with_parent)

    def __enter__(self) -> "TaskProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End the processes; after an error at once, whatever they are at."""
        if self._pool is None:
            return
        if kind is not None:
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, executor: LocalExecutor, ranks: Sequence[int]) -> None:
        """Run some tasks of a stage.

        Raises:
            DataError: A worker process died.
            UserError: As the steps.
        """
        if self._pool is None:
            for rank in ranks:
                executor.run_task(rank)
            return
        try:
            for done in as_completed(
                [self._pool.submit(executor.run_task, each) for each in ranks]
            ):
                done.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps because memory ran out; start again, with"
                " fewer --workers: what is finished stays"
            ) from error


def run_locally(stages: Sequence[FilterStage], folder: WorkFolder, *, workers: int) -> None:
    """Run what is missing of all stages, one stage after the other.

    Raises:
        DataError: A worker process died.
        UserError: As the steps.
    """
    most_tasks = max(stage.tasks for stage in stages)
    with TaskProcesses(min(workers, most_tasks)) as running:
        for stage in stages:
            executor = LocalExecutor(
                list(stage.steps),
                tasks=stage.tasks,
                logging_dir=local_folder(folder.stage(stage.name)),
            )
            missing = executor.get_incomplete_ranks()
            if missing and sys.stderr.isatty():
                print(f"{stage.name}: {len(missing)} of {stage.tasks} tasks", file=sys.stderr)
            running.run(executor, missing)
