"""Search for layouts that fit a number of GPUs.

The cost model is `moe_ext.cost`.
"""
