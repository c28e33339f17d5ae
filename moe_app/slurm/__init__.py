"""Submits, follows and requeues SLURM jobs.

The batch scripts are in examples/slurm.
"""
