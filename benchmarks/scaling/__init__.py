"""Cost of a training step over tokens, experts, layers and processes, and a model of it over GPUs.

One sweep a call of `python -m benchmarks.scaling`; benchmarks of one shape stay a folder up.
"""
