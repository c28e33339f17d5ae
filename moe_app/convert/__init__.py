"""Checkpoints from and to Hugging Face, with checks.

Tensor names are in `moe_ext.convert`, safetensors files in `megatron.trainer.hf_files`.
"""
