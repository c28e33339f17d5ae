"""Reads and writes Hugging Face checkpoint directories: config.json, safetensors, other files.

Read in this order: `header` (one safetensors file), `directory` (reading a checkpoint), `plan`
(which file gets which tensor), `shard_writer` (writing one), `publish` (under its name only when it
is complete). Nothing here knows a model, holds more than rows of one tensor, or executes anything.
"""

from megatron.trainer.hf_files.directory import HFDirectory
from megatron.trainer.hf_files.header import TensorEntry, read_header
from megatron.trainer.hf_files.plan import ShardPlan, parse_size, plan_shards
from megatron.trainer.hf_files.publish import new_directory
from megatron.trainer.hf_files.shard_writer import HFWriter

__all__ = [
    "HFDirectory",
    "HFWriter",
    "ShardPlan",
    "TensorEntry",
    "new_directory",
    "parse_size",
    "plan_shards",
    "read_header",
]
