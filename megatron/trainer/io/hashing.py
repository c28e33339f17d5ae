"""Computes SHA-256 of files, and of their regions in a second thread.

hashlib and reading let go of Python's lock, so on two cores the digests cost no time of their own.
The bytes are read from the file, where they still are in the system's memory when they have just
been read or written; no buffer has to be kept for them.
"""

import hashlib
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megatron.trainer.errors import CheckpointError

_BLOCK_BYTES = 1 << 20
_WAITING = 64

_Job = tuple["Digest", int, int, int]


def add_file(digest: "hashlib._Hash", file: BinaryIO) -> int:
    """Add the rest of an open file to a digest; return how many bytes that is."""
    count = 0
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        count += len(block)
    return count


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        add_file(digest, file)
    return digest.hexdigest()


class Digest:
    """Accumulates the digest of bytes that arrive in pieces."""

    def __init__(self, name: str) -> None:
        self.name = name
        """What errors call the bytes."""
        self.hash = hashlib.sha256()

    def hexdigest(self) -> str:
        """Return the digest of what was hashed so far; call it after `DigestThread.finish`."""
        return self.hash.hexdigest()


class DigestThread:
    """Hashes regions of files in the order given. Use it in a `with` statement.

    An error in the thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=_WAITING)
        self._error: Exception | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)
        self._thread.start()

    def __enter__(self) -> "DigestThread":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_stopped = kind is not None
        self._stop()

    def add(self, digest: Digest, descriptor: int, begin: int, num_bytes: int) -> None:
        """Continue `digest` with bytes of an open file, which must stay open until `finish`.

        Waits when the thread is far behind, so that the bytes are still in memory.
        """
        self._raise()
        self._jobs.put((digest, descriptor, begin, num_bytes))

    def finish(self) -> None:
        """Wait until everything has been hashed."""
        self._jobs.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while (job := self._jobs.get()) is not None:
            try:
                # After an error the rest of the jobs is only taken off the queue.
                if self._error is None and not self._is_stopped:
                    _update(*job, buffer)
            except Exception as error:  # raised again by the next call
                self._error = error
            finally:
                self._jobs.task_done()


def _update(digest: Digest, descriptor: int, begin: int, num_bytes: int, block: memoryview) -> None:
    end = begin + num_bytes
    while begin < end:
        count = os.preadv(descriptor, [block[: end - begin]], begin)
        if count == 0:
            raise CheckpointError(
                f"{digest.name} ends {end - begin} bytes too early; it was changed while it was"
                " read, start again with a valid one"
            )
        digest.hash.update(block[:count])
        begin += count
