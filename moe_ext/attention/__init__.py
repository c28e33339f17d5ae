"""Attention blocks."""

from moe_ext.attention.core import SDPACoreAttention
from moe_ext.attention.self_attention import FullWidthRMSNorm, QKNormSelfAttention

__all__ = ["FullWidthRMSNorm", "QKNormSelfAttention", "SDPACoreAttention"]
