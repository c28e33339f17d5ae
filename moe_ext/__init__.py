"""Provides mixture-of-experts blocks that plug into megatron-core, and what describes them.

Training, data and checkpoints are in `megatron.trainer`; `moe_app` joins the two.
"""
