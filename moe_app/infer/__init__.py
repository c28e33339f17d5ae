"""Generate and score from a checkpoint: the commands.

Decoding and sampling are in `megatron.trainer.inference`.
"""
