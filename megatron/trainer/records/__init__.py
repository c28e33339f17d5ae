"""Files of a run directory: writing, reading while they grow, and what they say of a run.

Imports no torch. Drawing and logging are hooks (`megatron.trainer.hooks`).
"""
