"""Submitting, following and requeueing SLURM jobs.

The batch scripts are in examples/slurm.
"""
