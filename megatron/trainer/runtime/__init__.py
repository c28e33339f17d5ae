"""Processes: device, groups, seeds, threads, signals, the log.

`launch` alone reads the environment and megatron-core's global groups. Steps and files are
elsewhere.
"""
