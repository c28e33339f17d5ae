"""Generation and scoring from a checkpoint.

Decoding and sampling are in `megatron.trainer.inference`.
"""
