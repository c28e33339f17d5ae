"""What survives a run: saving, finding and loading checkpoints.

Read in this order: `layout` (names, renames, the tracker), `save`, `find`, `load`; `ranks` keeps
the ranks in step, and `fit` compares configurations. `stream_write` and `stream_read` do for one
process and block by block what `save` and `load` do for a whole run.
"""

from megatron.trainer.checkpoint.compare_config import compare_configs, config_mismatch
from megatron.trainer.checkpoint.find import FoundCheckpoint, find_checkpoint
from megatron.trainer.checkpoint.load import load_checkpoint, read_text
from megatron.trainer.checkpoint.save import save_checkpoint
from megatron.trainer.checkpoint.stream_read import CheckpointReader, ManifestCheck
from megatron.trainer.checkpoint.stream_write import CheckpointStream, streamed_checkpoint

__all__ = [
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
