"""Move weights between a Hugging Face directory and a native checkpoint, a piece at a time."""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from megatron.trainer.checkpoint import CheckpointReader, CheckpointStream, ManifestCheck
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory, HFWriter
from megatron.trainer.hf_files.directory import Region
from megatron.trainer.io.hashing import Digest, DigestThread
from moe_ext.convert import Piece

logger = logging.getLogger("convert")

_LOG_INTERVAL_S = 10.0


class Progress:
    """Shows a progress bar on a terminal, or logs a line now and then; a context manager.

    Args:
        what: the task, for the log line.
        num_bytes: total bytes to process.
    """

    def __init__(self, what: str, num_bytes: int) -> None:
        self._what, self._total, self._done = what, num_bytes, 0
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self._what),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_INTERVAL_S:
            self._logged = now
            rate = self._done / (now - self._started)
            logger.info(
                "%s: %.1f of %.1f GB, %.2f GB/s, %.0f s left",
                self._what,
                self._done / 1e9,
                self._total / 1e9,
                rate / 1e9,
                (self._total - self._done) / rate,
            )


class TensorDigests:
    """Computes the SHA-256 of every Hugging Face tensor's bytes on disk.

    Args:
        thread: computes the digests; None computes none.
    """

    def __init__(self, thread: DigestThread | None) -> None:
        self._thread = thread
        self._digests: dict[str, Digest] = {}

    def add(self, name: str, region: Region) -> None:
        """Hash a tensor that has just been read or written completely."""
        if self._thread is None:
            return
        self._digests[name] = Digest(name)
        self._thread.add(self._digests[name], region.descriptor, region.begin, region.num_bytes)

    def finish(self) -> dict[str, str]:
        """Return hexadecimal digests by name; empty if none were requested."""
        if self._thread is not None:
            self._thread.finish()
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def import_weights(
    source: HFDirectory,
    pieces: Sequence[Piece],
    stream: CheckpointStream,
    *,
    dtype: torch.dtype,
    digests: TensorDigests,
    progress: Progress,
) -> None:
    """Write the weights of a native checkpoint.

    Args:
        source: holds every tensor that the pieces name, in the shapes that they name.
        pieces: of the model, in the source's layout.
        stream: the checkpoint.
        dtype: of the checkpoint.
        digests: collects those of the source's tensors.
        progress: counts the source's bytes.

    Raises:
        CheckpointError: a weight is not a finite number, or the source cannot be read.
    """
    tensors = source.tensors
    unread = {name: entry.num_bytes for name, entry in tensors.items()}
    for piece in pieces:
        parts = []
        for part in piece.sources:
            rows = source.read(part.name, start=part.start, count=part.count)
            cast = rows.to(dtype)
            check_finite(cast, part.name)
            parts.append(cast)
            unread[part.name] -= rows.nbytes
            if unread[part.name] == 0:
                digests.add(part.name, source.region(part.name))
            progress.advance(rows.nbytes)
        stream.write(piece.key, piece.offset, piece.to_native(parts).to(dtype))


def export_weights(
    reader: CheckpointReader,
    check: ManifestCheck,
    pieces: Sequence[Piece],
    writer: HFWriter,
    *,
    keys: Mapping[str, str],
    read: Callable[[Piece], torch.Tensor],
    dtype: torch.dtype,
    digests: TensorDigests,
    progress: Progress,
) -> None:
    """Write the weights of a Hugging Face checkpoint.

    Pieces are processed in the order in which the checkpoint stores them, so that a large chunk,
    which a single rank may have written for a layer's experts, is read once.

    Args:
        reader: holds every tensor, in the shapes that the pieces name.
        check: hashes the checkpoint while it is read; finished by the caller.
        pieces: of the model, in the output layout.
        writer: the files.
        keys: checkpoint name of each native tensor: its own, or that of its fp32 master weights.
        read: the block of a piece, with what an adapter adds.
        dtype: of the files.
        digests: collects those of the written tensors.
        progress: counts written bytes.

    Raises:
        CheckpointError: a weight is not a finite number, or the checkpoint is corrupt.
    """
    placed = []
    for number, piece in enumerate(pieces):
        if piece.sources:
            places = list(reader.places(keys[piece.key], piece.offset, piece.block))
            placed.append((places, number, piece))
    for places, _, piece in sorted(placed, key=lambda entry: entry[:2]):
        for place in places:
            check.reach(place)
        block = read(piece).to(dtype)
        check_finite(block, piece.key)
        for part, rows in zip(piece.sources, piece.to_hf(block), strict=True):
            region = writer.write(part.name, part.start, rows)
            if region is not None:
                digests.add(part.name, region)
            progress.advance(rows.nbytes)


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse NaN and infinity, which would spread to every output of the model.

    Checks the minimum and maximum, which are NaN if any value is.

    Raises:
        CheckpointError: the tensor holds one.
    """
    if tensor.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
        return
    raise CheckpointError(
        f"{name} holds {int((~tensor.isfinite()).sum())} values that are not finite (NaN or"
        f" infinite, or too large for {tensor.dtype}); weights must be finite; take a checkpoint"
        " from before they diverged, or --dtype fp32 if they only overflow"
    )
