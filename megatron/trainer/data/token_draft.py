"""Grows a token file in PREFIX.part/, so that a start after a kill goes on from the last commit.

    tokens.bin, lengths   what was written so far, and perhaps more than was committed
    state.json            the work it belongs to, and how far it has come
    tokens.idx, .json     index and manifest, there when all is written and verified

The finished files get their names one after the other: .bin, .idx, and the manifest last. A start
after a kill in between renames the rest. What is there under the final names stays until then.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.fingerprint import fingerprint
from megatron.trainer.data.indexed import TokenFacts, open_tokens
from megatron.trainer.data.token_manifest import (
    TokenManifest,
    manifest_path,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from megatron.trainer.data.writer import LENGTH_DTYPE, token_dtype, write_index
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import sync_directory, sync_file, write_text
from megatron.trainer.io.bounded_read import read_small

logger = logging.getLogger(__name__)

_STATE = "state.json"
_MOST_STATE_BYTES = 1 << 30


class TokenDraft:
    """Holds a token file that is being written; one process at a time may.

    As a context manager it keeps what was committed and leaves nothing where nothing was.

    Args:
        prefix: Path without .bin and .idx.
        work: What decides the content, in JSON's types; a draft of other work is refused.
        vocab_size: Every id must be below it.
        is_resumable: Whether what is read can be read again; else the work starts over.

    Raises:
        DataError: It cannot be written, another process writes it, or other work was begun there.
    """

    def __init__(
        self, prefix: str, work: Mapping[str, Any], *, vocab_size: int, is_resumable: bool = True
    ) -> None:
        self.prefix = prefix
        self.folder = Path(f"{prefix}.part")
        self.dtype = token_dtype(vocab_size)
        self.progress: dict[str, Any] = {}
        """What the last commit says of how far the work has come; empty for a new draft."""
        self.is_written = False
        """Whether nothing is missing but the index, the manifest and the names."""
        self.num_documents = self.num_tokens = 0
        self._work: dict[str, Any] = json.loads(json.dumps(work))
        self.num_committed = 0
        """Documents that a later start need not write again."""
        self._vocab_size = vocab_size
        self._tokens = str(self.folder / "tokens")
        read_manifest(prefix)  # raises before the work, not after it
        with contextlib.ExitStack() as opened, self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(self._lock())
            self._load()
            if not is_resumable and self.progress:
                self._forget()
            if not self._is_named():
                sizes = (
                    self.num_tokens * self.dtype.itemsize,
                    self.num_documents * LENGTH_DTYPE.itemsize,
                )
                self._bin = opened.enter_context(_open_at(f"{self._tokens}.bin", sizes[0]))
                self._lengths = opened.enter_context(_open_at(self.folder / "lengths", sizes[1]))
            self._opened = opened.pop_all()

    def __enter__(self) -> "TokenDraft":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files; remove them where nothing was committed."""
        if not self.progress:
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # what is buffered may not fit on a full disk
            self._opened.close()

    def append(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents.

        Args:
            ids: Their tokens end to end, in this draft's dtype.
            lengths: Tokens of each document, none of them 0.
        """
        with self._writing():
            self._bin.write(ids.data)
            self._lengths.write(lengths.astype(LENGTH_DTYPE).data)
        self.num_tokens += ids.size
        self.num_documents += lengths.size

    def commit(self, progress: Mapping[str, Any], *, is_written: bool = False) -> None:
        """Force what was appended to disk; a later start goes on from here.

        Args:
            progress: How far the work has come, in JSON's types; not empty.
            is_written: Whether nothing is missing.
        """
        state = {
            "work": self._work,
            "progress": progress,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "is_written": is_written,
        }
        with self._writing():
            sync_file(self._bin)
            sync_file(self._lengths)
            write_text(self.folder / _STATE, json.dumps(state) + "\n", durable=True)
        self.progress, self.is_written = dict(progress), is_written
        self.num_committed = self.num_documents

    def finish(self, described: Mapping[str, Any]) -> TokenManifest:
        """Write index and manifest, verify, and give all three files their names.

        Args:
            described: Fields of the manifest, without those of TokenFacts.

        Raises:
            DataError: The files do not verify.
        """
        with self._writing():
            if not self._is_named():
                write_index(Path(f"{self._tokens}.idx"), self._lengths, dtype=self.dtype)
                facts = dataclasses.asdict(self._facts())
                write_manifest(self._tokens, TokenManifest(**described, **facts))
            self._rename()
            shutil.rmtree(self.folder)
        found = read_manifest(self.prefix)
        assert found is not None
        return found

    def _is_named(self) -> bool:
        """Return whether all is verified, and a kill may have come between the names."""
        has_manifest = manifest_path(self._tokens).exists()
        return self.is_written and (has_manifest or not Path(f"{self._tokens}.bin").exists())

    def _facts(self) -> TokenFacts:
        """Return what was written, verified as a reader would; a shard may hold no document."""
        if self.num_tokens:
            return open_tokens(self._tokens, vocab_size=self._vocab_size).facts
        digest = fingerprint(Path(f"{self._tokens}.idx"), np.empty(0, self.dtype))
        return TokenFacts(dtype=self.dtype.name, num_documents=0, num_tokens=0, fingerprint=digest)

    def _rename(self) -> None:
        if Path(f"{self._tokens}.idx").exists():
            remove_manifest(self.prefix)
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx", ".json"):
            with contextlib.suppress(FileNotFoundError):  # renamed before a kill
                os.replace(self._tokens + suffix, self.prefix + suffix)
        sync_directory(Path(self.prefix).parent)

    def _load(self) -> None:
        """Read how far the work has come."""
        path = self.folder / _STATE
        if not path.exists():
            return
        try:
            state = json.loads(read_small(path, most_bytes=_MOST_STATE_BYTES))
            begun, self.progress = dict(state["work"]), dict(state["progress"])
            self.num_documents = self.num_committed = int(state["num_documents"])
            self.num_tokens = int(state["num_tokens"])
            self.is_written = bool(state["is_written"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} is not as this command writes it ({error}); remove {self.folder} to start"
                " over"
            ) from error
        changed = [name for name in self._work | begun if self._work.get(name) != begun.get(name)]
        if changed:
            raise DataError(
                f"{self.folder} holds what an unfinished start wrote with other"
                f" {', '.join(changed)}; only the same work can go on; start as then, or remove"
                " the folder to start over"
            )

    def _forget(self) -> None:
        """Start over."""
        (self.folder / _STATE).unlink()
        manifest_path(self._tokens).unlink(missing_ok=True)
        self.progress, self.is_written = {}, False
        self.num_documents = self.num_tokens = self.num_committed = 0

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{self.folder} is being written by another process; one at a time may; wait"
                    " for it, or give another --output-prefix"
                ) from error
            except OSError:
                logger.info("%s: this file system has no locks", self.folder)
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Name what cannot be written."""
        try:
            yield
        except OSError as error:
            kept = f"; {self.num_committed:,} documents are kept: start again to go on"
            raise DataError(
                f"{self.folder} cannot be written: {error.strerror or error}; the files of"
                " --output-prefix need a folder that may be written and has space; make room, or"
                f" choose another prefix{kept if self.progress else ''}"
            ) from error


def _open_at(path: str | Path, size: int) -> BinaryIO:
    """Open a file at the end of what was committed.

    Raises:
        DataError: It is shorter.
    """
    file = open(path, "r+b" if os.path.exists(path) else "w+b")
    found = file.seek(0, os.SEEK_END)
    if found < size:
        file.close()
        raise DataError(
            f"{path} has {found:,} bytes, but {size:,} were committed; it was changed; remove"
            f" {Path(path).parent} to start over"
        )
    file.seek(size)
    file.truncate()
    return file
