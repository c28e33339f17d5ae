"""Configures logging: rank 0 logs the run, other ranks only their warnings."""

import logging
import sys

from megatron.trainer.errors import printable


def configure_logging(rank: int) -> None:
    """Log to standard error: everything from rank 0, warnings from other ranks with the rank."""
    handler = _StderrHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # megatron-core announces its whole config at INFO, matplotlib its fonts.
    for talkative in ("megatron.core", "matplotlib"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    """Keeps what stands in names and texts of others from the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a line, with control characters spelled out."""
        return printable(super().format(record))


class _StderrHandler(logging.StreamHandler):
    """Writes to what is standard error at the moment: a progress bar replaces it while it lives."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; above the bar, if there is one."""
        self.stream = sys.stderr
        super().emit(record)
