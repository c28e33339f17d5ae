"""Reports on one page what a machine can do for a run, and what would stop it.

The checks of ranks are in `megatron.trainer.health`.
"""
