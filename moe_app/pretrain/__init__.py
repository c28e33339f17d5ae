"""Pretraining: config of a run, its state, hooks and command.

The loop, the step and checkpoints are in `megatron.trainer`.
"""
