"""Defines the settings of a run, reads them from recipes and flags, and validates them.

Model settings live in `moe_ext.config`; nothing is built here.
"""
