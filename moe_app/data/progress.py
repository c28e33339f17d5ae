"""Tells on standard error how far a long command has come, how fast, and how long it will take."""

import sys
import time
from typing import TextIO

from megatron.trainer.records.history import duration

_SECONDS_BETWEEN = 10.0


class ReadProgress:
    """Prints a line now and then.

    Args:
        name: What is made, for the line.
        total: Bytes to read in all; None where it is not known.
        begun: Bytes that an earlier start read.
    """

    def __init__(self, name: str, *, total: int | None, begun: int = 0) -> None:
        self._name = name
        self._total = total
        self._begun = begun
        self._started = self._shown = time.monotonic()
        self._first_tokens: int | None = None

    def update(
        self, done: int, *, num_documents: int, num_tokens: int, file: TextIO | None = None
    ) -> None:
        """Print a line if the latest is a while ago.

        Args:
            done: Bytes read, those of an earlier start included.
            num_documents: Documents written, those of an earlier start included.
            num_tokens: Tokens written, those of an earlier start included.
            file: Where to; standard error without it.
        """
        now = time.monotonic()
        if self._first_tokens is None:
            self._first_tokens = num_tokens
        if now - self._shown < _SECONDS_BETWEEN:
            return
        self._shown = now
        seconds = now - self._started
        rate = (done - self._begun) / seconds
        parts = [f"{num_documents:,} documents", f"{num_tokens:,} tokens"]
        if self._total:
            parts.insert(0, f"{min(1.0, done / self._total):.1%} of {self._total / 1e9:,.2f} GB")
        parts.append(f"{rate / 1e6:,.2f} MB/s")
        parts.append(f"{(num_tokens - self._first_tokens) / seconds:,.0f} tokens/s")
        if self._total and rate > 0:
            parts.append(f"{duration((self._total - done) / rate)} left")
        print(f"{self._name}: {', '.join(parts)}", file=file or sys.stderr, flush=True)
