"""Starts the processes of a run and keeps them in step: device, groups, seeds, signals, log.

`launch` alone reads the environment and megatron-core's global groups. Steps and files are
elsewhere.
"""
