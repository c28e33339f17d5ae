"""Settings of a run: their schema, how recipes and flags become one config, and what is refused.

Holds no model settings (`moe_ext.config`) and builds nothing.
"""
