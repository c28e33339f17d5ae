"""Reads the data of tasks from a local directory in place of the Hub.

    DIR/<dataset>/<config>/<split>.parquet or .jsonl

`<dataset>` is the id that the task names, with `--` for `/`; `<config>` is the dataset's
configuration, `default` where the task names none, and ends in `--` and eight digits of a hash
where the task chooses files in it. `fetch_tasks` writes this layout and a `manifest.json` with a
hash of each file, which is checked where it is there.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import pyarrow
import pyarrow.parquet

from megatron.trainer.errors import DataError
from moe_app.evaluate.task_manifest import check_file, hashes_of

_READERS = {".parquet": "parquet", ".jsonl": "json"}
_FILE_READERS = ("json", "parquet", "csv", "text", "arrow")
_NO_CHOICES = ("trust_remote_code", "cache_dir", "download_mode")


def dataset_folder(root: Path, path: str, name: str | None) -> Path:
    """Return where the data of a dataset lie."""
    return root / path.replace("/", "--") / (name or "default")


def config_name(name: str | None, choices: Mapping[str, Any]) -> str | None:
    """Return the name of the folder for a configuration of a dataset.

    Args:
        name: the configuration; None is the dataset's only one.
        choices: further arguments of `datasets.load_dataset`, such as `data_files`.
    """
    chosen = {key: value for key, value in choices.items() if key not in _NO_CHOICES}
    if not chosen:
        return name
    text = json.dumps(chosen, sort_keys=True, default=str)
    return f"{name or 'default'}--{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_own_file(path: str, choices: Mapping[str, Any]) -> bool:
    """Return whether a task reads a file of the user's, which is where it says."""
    if path in _FILE_READERS:
        return "://" not in json.dumps(choices.get("data_files"), default=str)
    return Path(path).exists()


@contextlib.contextmanager
def local_datasets(root: Path | None) -> Iterator[None]:
    """Let the harness read every dataset from `root` within the context; None leaves it alone.

    A task whose dataset is a file of the user's (`dataset_path: json`, `parquet`, ...) reads it as
    ever.
    """
    if root is None:
        yield
        return
    folder, hashes = root, hashes_of(root)

    def load(path: str, name: str | None = None, **choices: Any) -> Any:
        if is_own_file(path, choices):
            return datasets.load_dataset(path, name, **choices)
        return _load(folder, hashes, path, config_name(name, choices))

    with stand_in(load):
        yield


@contextlib.contextmanager
def stand_in(load: Callable[..., Any]) -> Iterator[None]:
    """Let the harness load datasets by `load` within the context."""
    original = lm_eval.api.task.datasets

    class Local:
        """Stands for the package `datasets` in the harness's module of tasks."""

        load_dataset = staticmethod(load)

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

    lm_eval.api.task.datasets = Local()
    try:
        yield
    finally:
        lm_eval.api.task.datasets = original


def load_folder(root: Path, path: str, name: str | None) -> Any:
    """Read all splits of a dataset.

    Raises:
        DataError: it is not there, or is not what was fetched.
    """
    return _load(root, hashes_of(root), path, name)


def read_records(root: Path, path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """Return the records of one split of a dataset, in the order of its file.

    Raises:
        DataError: it is not there, cannot be read, or is not what was fetched.
    """
    files = _checked_files(root, hashes_of(root), path, name)
    if split not in files:
        raise DataError(
            f"{dataset_folder(root, path, name)} has no split {split!r}; its files are called after"
            f" splits; put {split}.jsonl or {split}.parquet there"
        )
    return _read_file(files[split])


def read_record_file(root: Path, file: Path) -> list[dict[str, Any]]:
    """Return the records of a file in the directory of tasks.

    Raises:
        DataError: it cannot be read, or is not what was fetched.
    """
    hashes = hashes_of(root)
    if not file.is_file():
        raise DataError(f"{file} is not there; put the published file there")
    check_file(root, hashes, file)
    return _read_file(file)


def _read_file(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON Lines or Parquet.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            found = pyarrow.parquet.read_table(file).to_pylist()
        else:
            lines = file.read_text("utf-8").split("\n")
            found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}; fetch it again") from error
    if not found or not all(isinstance(each, dict) for each in found):
        raise DataError(f"{file} must hold at least one object, and nothing else; fetch it again")
    return found


def _load(root: Path, hashes: Mapping[str, str], path: str, name: str | None) -> Any:
    """Read all splits of a dataset.

    Raises:
        DataError: it is not there, or is not what was fetched.
    """
    splits = {}
    for split, file in _checked_files(root, hashes, path, name).items():
        reader = _READERS[file.suffix]
        try:
            splits[split] = datasets.load_dataset(reader, data_files=str(file), split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise DataError(
                f"{file} cannot be read as {reader}: {error}; fetch it again"
            ) from error
    return datasets.DatasetDict(splits)


def _checked_files(
    root: Path, hashes: Mapping[str, str], path: str, name: str | None
) -> dict[str, Path]:
    """Return the files of a dataset by split.

    Raises:
        DataError: there are none, or one is not what was fetched.
    """
    folder = dataset_folder(root, path, name)
    files = sorted(each for each in folder.glob("*") if each.suffix in _READERS)
    if not files:
        raise DataError(
            f"{folder} has no .parquet or .jsonl file; --task-data holds a folder for each dataset"
            " of a task; fetch it where there is a network, with tools/fetch_tasks.py"
        )
    for file in files:
        check_file(root, hashes, file)
    return {file.stem: file for file in files}
