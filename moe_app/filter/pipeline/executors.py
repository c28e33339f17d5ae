"""Runs stages with datatrove's executors."""

import contextlib
import copy
import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import multiprocess
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
    parent = multiprocess.parent_process()
    if parent is None or any(each.name == "end_with_parent" for each in threading.enumerate()):
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


class LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks of a stage in processes of this machine."""

    def run(self) -> None:
        """Run the tasks that are missing.

        Raises:
            UserError: As the steps.
        """
        logger.remove()
        if self.workers > 1:
            super().run()
            return
        steps: list[PipelineStep] = self.pipeline
        for rank in self.get_incomplete_ranks():
            self.pipeline: list[PipelineStep] = copy.deepcopy(steps)
            self._run_for_rank(rank)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        end_with_parent()
        with quiet():
            return super()._run_for_rank(rank, local_rank, node_rank)


def run_locally(stages: Sequence[FilterStage], folder: WorkFolder, *, workers: int) -> None:
    """Run what is missing of all stages, one stage after the other.

    Raises:
        DataError: A worker process died.
        UserError: As the steps.
    """
    for stage in stages:
        options: dict[str, Any] = {"tasks": stage.tasks, "workers": min(workers, stage.tasks)}
        executor = LocalExecutor(
            list(stage.steps), logging_dir=local_folder(folder.stage(stage.name)), **options
        )
        missing = executor.get_incomplete_ranks()
        if not missing:
            continue
        if sys.stderr.isatty():
            print(f"{stage.name}: {len(missing)} of {stage.tasks} tasks", file=sys.stderr)
        executor.run()
        if executor.get_incomplete_ranks():
            raise DataError(
                f"{stage.name}: tasks are missing although none failed; see the log in"
                f" {folder.stage(stage.name)}"
            )
