"""Writes the files of a run directory, and reads them while they grow.

Imports no torch. Drawing and logging are hooks (`megatron.trainer.hooks`).
"""
