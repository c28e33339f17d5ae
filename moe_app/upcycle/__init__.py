"""Turn dense models into mixtures of experts: the command, its sources, its first loss.

The weights are made in `moe_ext.upcycling`.
"""
