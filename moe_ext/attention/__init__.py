"""Holds self-attentions by name, the core attention they share, and the key-value cache.

Mixture-of-heads attention (moa) multiplies through `moe_ext.experts`; norms and positions are in
`moe_ext.layers`.
"""

from megatron.core.transformer.attention import SelfAttention

from moe_ext import registry
from moe_ext.attention.core import SDPACoreAttention
from moe_ext.attention.moa import MoASelfAttention, MoASubmodules
from moe_ext.attention.self_attention import FullWidthRMSNorm, QKNormSelfAttention

ATTENTIONS: dict[str, type[SelfAttention | MoASelfAttention]] = {
    "full_width_qk_norm": QKNormSelfAttention,
    "moa": MoASelfAttention,
    "standard": SelfAttention,
}
"""What `MoEModelConfig.attention` can name."""


def get_attention(name: str) -> type[SelfAttention | MoASelfAttention]:
    """Looks up the self-attention class called `name`.

    Raises:
        ValueError: no such attention; the message names the nearest one.
    """
    return registry.look_up(ATTENTIONS, name, kind="attention")


def register_attention(name: str, attention: type[SelfAttention]) -> None:
    """Makes `attention` available under `name`.

    Raises:
        ValueError: the name is taken, or the class is not a megatron-core SelfAttention.
    """
    if not (isinstance(attention, type) and issubclass(attention, SelfAttention)):
        raise ValueError(
            f"attention '{name}' is {attention!r}; derive a class from"
            " megatron.core.transformer.attention.SelfAttention"
        )
    registry.add(ATTENTIONS, name, attention, kind="attention")


__all__ = [
    "ATTENTIONS",
    "FullWidthRMSNorm",
    "MoASelfAttention",
    "MoASubmodules",
    "QKNormSelfAttention",
    "SDPACoreAttention",
    "get_attention",
    "register_attention",
]
