"""Keeps the answers of a model as they come, so that an interrupted evaluation goes on.

One JSON object a line: first what computed the answers, then each answer under the SHA-256 of its
request. What a killed process left unfinished at the end is dropped.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import atomic_write

logger = logging.getLogger("evaluate")

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
            kept = self._read(identity)
            with atomic_write(path) as file:
                file.writelines([head, *kept])
            self._file = path.open("ab")
        except OSError as error:
            raise self._failure(error) from error
        if self._answers:
            logger.info("%s has %d answers of an earlier start", path, len(self._answers))

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

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
                if record is None or not isinstance(record.get("key"), str):
                    logger.warning("%s: dropped an unfinished answer", self._path)
                    continue
                self._answers[record["key"]] = record.get("answer", 0.0)
                lines.append(line)
        return lines

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"{self._path} cannot be read or written: {error.strerror or error}; answers are kept"
            " there; free some space, or name another --output"
        )


def _line(key: str, answer: Answer) -> bytes:
    return json.dumps({"key": key, "answer": answer}).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
