"""Keeps the answers of a model as they come, so that an interrupted evaluation goes on.

One JSON object a line: first what computed the answers, then each answer under the SHA-256 of its
request. What a killed process left unfinished at the end is dropped.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import atomic_write
from megatron.trainer.io.file_lock import NO_LOCKS, wait_for_lock

logger = logging.getLogger("evaluate")

PATIENCE_S = 20.0
"""How long an evaluation that was killed may take to end. Where the file system has no locks, two
evaluations are the user's to keep apart."""

Answer = list[Any] | tuple[Any, ...] | float
"""A log-probability, a pair of one and whether it is greedy, or ids."""


def request_key(kind: str, request: Any) -> str:
    """Return the name of a request: its kind, and whatever decides its answer, as JSON."""
    text = json.dumps([kind, request], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerFile:
    """Reads the answers that an earlier process kept, and appends new ones; a context manager.

    Args:
        path: of the file; made if there is none.
        identity: of model, precision and tokenizer; answers of another one are refused.

    Raises:
        ConfigError: the file has answers of something else.
        DataError: it cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        head = json.dumps({"identity": identity}, sort_keys=True).encode() + b"\n"
        try:
            with contextlib.ExitStack() as stack:
                lock = stack.enter_context(Path(f"{path}.lock").open("ab"))
                self._lock(lock)
                kept = self._read(identity)
                with atomic_write(path) as file:
                    file.writelines([head, *kept])
                self._file = stack.enter_context(path.open("ab"))
                self._open = stack.pop_all()
        except OSError as error:
            raise self._failure(error) from error
        if self._answers:
            logger.info("%s has %d answers of an earlier start", path, len(self._answers))

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._open.close()

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """Return an answer; None if it is not known yet."""
        return self._answers.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers by key.

        Raises:
            DataError: they cannot be written.
        """
        try:
            for key, answer in answers.items():
                self._answers[key] = answer
                self._file.write(_line(key, answer))
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _lock(self, lock: BinaryIO) -> None:
        """Keep the file from other evaluations until this one ends, however it does.

        Raises:
            ConfigError: one writes to it.
        """
        try:
            wait_for_lock(lock, PATIENCE_S)
        except BlockingIOError as error:
            raise ConfigError(
                f"another evaluation keeps its answers in {self._path} now; a directory"
                " holds one at a time; wait for it, or name another --output"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def _read(self, identity: Mapping[str, Any]) -> list[bytes]:
        """Take over the answers of a file; return their lines."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            head = _parse(file.readline())
            if head is None or "identity" not in head:
                raise ConfigError(
                    f"{self._path} is no file of answers; an evaluation keeps its answers there;"
                    " move it away, or name another --output"
                )
            named = head["identity"] if isinstance(head["identity"], dict) else {}
            changed = [key for key in identity if named.get(key) != identity[key]]
            if changed:
                raise ConfigError(
                    f"{self._path} has the answers of another model: its {changed[0]} is"
                    f" {named.get(changed[0])}, and this one's {identity[changed[0]]}; a directory"
                    " holds one evaluation; name another --output"
                )
            lines = []
            for line in file:
                record = _parse(line) if line.endswith(b"\n") else None
                if (
                    record is None
                    or not isinstance(record.get("key"), str)
                    or ("answer" not in record)
                ):
                    logger.warning("%s: dropped an answer that is not whole", self._path)
                    continue
                self._answers[record["key"]] = record["answer"]
                lines.append(line)
        return lines

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"{self._path} cannot be read or written: {error.strerror or error}; answers are kept"
            " there; free some space, or name another --output"
        )


def _line(key: str, answer: Answer) -> bytes:
    return json.dumps({"key": key, "answer": answer}).encode() + b"\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no answer of a valid model")


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line; None where it is none, or holds NaN or infinity."""
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
