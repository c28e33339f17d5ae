"""Observes a run: writers of records, console, plots, profiler.

A hook never changes the run; what saves or rewinds is handed to `megatron.trainer.loop` instead.
"""
