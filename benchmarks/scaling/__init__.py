"""Measures a training step over tokens, experts, layers, processes, and models it over GPUs.

`python -m benchmarks.scaling` runs one sweep. Benchmarks of a single shape are one folder up.
"""
