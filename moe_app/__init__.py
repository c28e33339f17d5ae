"""Joins megatron.trainer and moe_ext: one folder a feature, one command a tool.

`moe_app.cli` lists the commands. Nothing in the two packages imports this one.
"""
