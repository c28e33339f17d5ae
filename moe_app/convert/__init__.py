"""Convert checkpoints from and to Hugging Face: the command, its checks and verification.

Tensor names are in `moe_ext.convert`, safetensors files in `megatron.trainer.hf_files`.
"""
