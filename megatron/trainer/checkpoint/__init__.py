"""Saves, finds and loads checkpoints.

Read in this order: `layout` (names, renames, the tracker), `save`, `background` (the same in a
thread), `find`, `load`; `stages` keeps the ranks in step, `compare_config` compares configurations,
`saved_run` reads what a run keeps beside its state. `stream_write` and `stream_read` do in one
process, block by block, what `save` and `load` do for all ranks.
"""

from megatron.trainer.checkpoint.background import BackgroundSaver
from megatron.trainer.checkpoint.compare_config import compare_configs, config_mismatch
from megatron.trainer.checkpoint.find import FoundCheckpoint, find_checkpoint
from megatron.trainer.checkpoint.load import load_checkpoint, read_text
from megatron.trainer.checkpoint.save import save_checkpoint
from megatron.trainer.checkpoint.stream_read import CheckpointReader, ManifestCheck
from megatron.trainer.checkpoint.stream_write import CheckpointStream, streamed_checkpoint

__all__ = [
    "BackgroundSaver",
    "CheckpointReader",
    "CheckpointStream",
    "FoundCheckpoint",
    "ManifestCheck",
    "compare_configs",
    "config_mismatch",
    "find_checkpoint",
    "load_checkpoint",
    "read_text",
    "save_checkpoint",
    "streamed_checkpoint",
]
