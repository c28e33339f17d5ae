"""Copies the datasets of tasks into the layout that `task_data` reads."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
from lm_eval.api.task import ConfigurableTask

from megatron.trainer.errors import DataError, UserError
from megatron.trainer.io.atomic_write import atomic_write
from megatron.trainer.io.hashing import file_sha256
from moe_app.evaluate.coding.problems import CODE_TASKS
from moe_app.evaluate.harness.task_data import (
    config_name,
    dataset_folder,
    is_own_file,
    load_folder,
    stand_in,
)
from moe_app.evaluate.harness.task_search import find_tasks
from moe_app.evaluate.suites import Suite
from moe_app.evaluate.task_manifest import add_files, read_manifest

logger = logging.getLogger("evaluate")


def fetch_suite(suite: Suite, include_path: Sequence[str], root: Path, source: Path | None) -> int:
    """Fetch the datasets of every task; go on after one that fails, and tell of all at the end.

    Args:
        suite: the tasks.
        include_path: directories of task files.
        root: gets the data.
        source: has copies of the datasets' repositories; None downloads them.

    Returns:
        The number of datasets.

    Raises:
        UserError: a task is not known, or data of some tasks could not be fetched.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = find_tasks(include_path, suite.tasks)
    fetcher = Fetcher(root, source)
    failures: list[str] = []
    with fetcher.in_harness():
        for name in suite.tasks:
            fetcher.task = name
            try:
                manager.load([name])
            except UserError as error:
                failures.append(str(error))
            except Exception as error:
                # Whatever code of a task raises: the others are fetched all the same.
                failures.append(f"task {name}: {type(error).__name__}: {error}")
        for name in suite.own:
            if name not in CODE_TASKS:
                logger.warning("the questions of %s are not fetched; docs/evaluation.md", name)
                continue
            fetcher.task = name
            try:
                fetcher.load(CODE_TASKS[name].dataset, CODE_TASKS[name].config)
            except UserError as error:
                failures.append(str(error))
    if failures:
        raise DataError(
            f"{len(failures)} of {len(suite.tasks) + len(suite.own)} could not be fetched; what was"
            f" is kept, and the same command goes on; mend these first: {'; '.join(failures)}"
        )
    return len(fetcher.found)


class Fetcher:
    """Stands for the loading of datasets in the harness, and keeps a copy of each.

    Args:
        root: gets the copies.
        source: has the datasets' repositories; None downloads them.
    """

    def __init__(self, root: Path, source: Path | None) -> None:
        self.task = ""
        """Whose data are fetched."""
        self.found: set[str] = set()
        """Folders of the datasets that are there."""
        self._root = root
        self._source = source
        self._original = lm_eval.api.task.datasets

    @contextlib.contextmanager
    def in_harness(self) -> Iterator[None]:
        """Let tasks of the harness load their datasets by this one within the context."""
        download = ConfigurableTask.download

        def named(task: Any, *args: Any, **kwargs: Any) -> None:
            self.task = task.config.task
            download(task, *args, **kwargs)

        with stand_in(self.load):
            ConfigurableTask.download = named
            try:
                yield
            finally:
                ConfigurableTask.download = download

    def load(self, path: str, name: str | None = None, **kwargs: Any) -> Any:
        """Return a dataset, which is copied unless an earlier start did so.

        Raises:
            DataError: it cannot be loaded or written.
        """
        if is_own_file(path, kwargs):
            return self._original.load_dataset(path, name, **kwargs)
        config = config_name(name, kwargs)
        folder = dataset_folder(self._root, path, config)
        if not self._is_whole(folder):
            splits = self._load(path, name, kwargs)
            self._write(folder, splits, {"dataset": path, "config": name})
        self.found.add(str(folder))
        return load_folder(self._root, path, config)

    def _load(self, path: str, name: str | None, kwargs: dict[str, Any]) -> Any:
        where = path if self._source is None else str(self._source / path)
        if self._source is not None and not Path(where).exists():
            raise DataError(
                f"task {self.task}: {where} is not there; --source holds a copy of the repository"
                f" of each dataset; put that of {path} there"
            )
        logger.info("fetching %s%s", path, "" if name is None else f", {name}")
        try:
            return self._original.load_dataset(where, name, **kwargs)
        except Exception as error:
            # What the package raises has no common class: of the network, the Hub, or a file.
            raise DataError(
                f"task {self.task}: its dataset {path} ({name or 'default'}) cannot be loaded:"
                f" {type(error).__name__}: {error}; look at the network, at the access to the"
                " dataset (huggingface-cli login), or copy its repository and name --source"
            ) from error

    def _is_whole(self, folder: Path) -> bool:
        """Return whether an earlier start copied all splits of a dataset."""
        relative = folder.relative_to(self._root).as_posix()
        kept = {
            name: each
            for name, each in read_manifest(self._root).items()
            if Path(name).parent.as_posix() == relative
        }
        files = [self._root / name for name in kept]
        return bool(kept) and all(
            file.is_file() and file_sha256(file) == each["sha256"]
            for file, each in zip(files, kept.values(), strict=True)
        )

    def _write(self, folder: Path, splits: Any, facts: dict[str, Any]) -> None:
        files = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split, rows in splits.items():
                files.append(folder / f"{split}.parquet")
                with atomic_write(files[-1], durable=True) as file:
                    rows.to_parquet(file)
        except OSError as error:
            raise DataError(
                f"task {self.task}: {folder} cannot be written: {error.strerror or error}; free"
                " some space, or name another --output"
            ) from error
        # Together, so that a dataset in the manifest is whole.
        add_files(self._root, files, {**facts, "task": self.task})
