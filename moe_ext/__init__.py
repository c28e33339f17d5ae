"""Mixture-of-experts blocks that plug into megatron-core, and what describes them."""
