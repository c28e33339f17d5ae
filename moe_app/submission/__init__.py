"""Submits recipes of any stage of training to SLURM."""
