"""Asks SLURM about jobs, formats their scripts and requeues them.

The batch scripts are in examples/slurm.
"""
