"""A write that fails is named, also where torch hides it behind the closing of its archive."""

import io
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron.trainer.checkpoint import save_checkpoint
from megatron.trainer.checkpoint.stages import write_errors_kept
from megatron.trainer.errors import CheckpointError


def write_on_a_full_disk(*_: Any) -> None:
    class Full(io.RawIOBase):
        left = 700

        def writable(self) -> bool:
            return True

        def write(self, block: Any) -> int:
            size = memoryview(block).nbytes
            if size > self.left:
                raise OSError(28, "No space left on device")
            self.left -= size
            return size

    torch.save(torch.ones(300), cast(IO[bytes], Full()))


def test_torch_hides_a_failed_write() -> None:
    """The reason for all of this; where this fails, `write_errors_kept` may go."""
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_on_a_full_disk()
    with pytest.raises(OSError, match="No space left"), write_errors_kept():
        write_on_a_full_disk()


def test_a_save_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_on_a_full_disk)
    state = {"model": {"a": ShardedTensor.from_rank_offsets("model.a", torch.ones(64, 8))}}
    with pytest.raises(CheckpointError, match=r"on rank 0: OSError: \[Errno 28\] No space left"):
        save_checkpoint(tmp_path, 1, state)
    assert not list(tmp_path.glob("iter_*"))


def test_an_error_with_no_failed_write_behind_it_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="of another kind"), write_errors_kept():
        raise RuntimeError("of another kind")
