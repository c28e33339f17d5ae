"""Reads the data of tasks from a local directory in place of the Hub.

    DIR/<dataset>/<config>/<split>.parquet or .jsonl

`<dataset>` is the id that the task names, with `--` for `/`; `<config>` is the dataset's
configuration, `default` where the task names none. `fetch_tasks` writes this layout and a
`manifest.json` with a hash of each file, which is checked where it is there.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import pyarrow
import pyarrow.parquet

from megatron.trainer.errors import DataError
from megatron.trainer.io.hashing import file_sha256

MANIFEST_NAME = "manifest.json"
_READERS = {".parquet": "parquet", ".jsonl": "json"}


def dataset_folder(root: Path, path: str, name: str | None) -> Path:
    """Return where the data of a dataset lie."""
    return root / path.replace("/", "--") / (name or "default")


@contextlib.contextmanager
def local_datasets(root: Path | None) -> Iterator[None]:
    """Let the harness read every dataset from `root` within the context; None leaves it alone.

    A task whose dataset is a file of the user's (`dataset_path: json`, `parquet`, ...) reads it as
    ever.
    """
    if root is None:
        yield
        return
    folder, hashes = root, _read_manifest(root)
    original = lm_eval.api.task.datasets

    class Local:
        """Stands for the package `datasets` in the harness's module of tasks."""

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        @staticmethod
        def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
            if path in ("json", "parquet", "csv", "text", "arrow") or Path(path).exists():
                return original.load_dataset(path, name, **kwargs)
            return _load(folder, hashes, path, name)

    lm_eval.api.task.datasets = Local()
    try:
        yield
    finally:
        lm_eval.api.task.datasets = original


def read_records(root: Path, path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """Return the records of one split of a dataset, in the order of its file.

    Raises:
        DataError: it is not there, cannot be read, or is not what was fetched.
    """
    files = _checked_files(root, _read_manifest(root), path, name)
    if split not in files:
        raise DataError(
            f"{dataset_folder(root, path, name)} has no split {split!r}; its files are called after"
            f" splits; put {split}.jsonl or {split}.parquet there"
        )
    return read_record_file(files[split])


def read_record_file(file: Path) -> list[dict[str, Any]]:
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
        known = hashes.get(str(file.relative_to(root)))
        if known is not None and file_sha256(file) != known:
            raise DataError(
                f"{file} is not the file that {root / MANIFEST_NAME} names; its SHA-256 differs;"
                " fetch it again"
            )
    return {file.stem: file for file in files}


def _read_manifest(root: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its path in `root`; none where there is no manifest."""
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise DataError(f"--task-data {root} is no directory; name the one that was fetched")
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text("utf-8"))["files"]
        return {str(name): str(each["sha256"]) for name, each in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no manifest of fetched tasks: {error!r}; fetch again"
        ) from error
