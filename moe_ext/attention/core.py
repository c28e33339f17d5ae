"""Computes core attention with torch's scaled dot product attention."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from moe_ext.attention.cache import KeyValueCache, LayerCache
from moe_ext.attention.packed import (
    PackedDocuments,
    attend_at_once,
    attend_one_by_one,
    has_kernel,
)
from moe_ext.attention.scaled_dot_product import attend, sees_to_the_end
from moe_ext.layers.context_parallel import gather_key_value, query_parts

_MASKS = (AttnMaskType.causal, AttnMaskType.no_mask)


class SDPACoreAttention(MegatronModule):
    """Computes softmax(scale q k^T) v by torch's fused kernels, grouped heads not repeated.

    It stands where megatron-core's DotProductAttention does, and does less: causal or unmasked
    attention without dropout, or attention under an explicit mask. Under context parallelism it
    exchanges keys and values over the group. While generating it attends to earlier tokens in
    `cache` too (`use_cache`). Everything else is refused.

    Args:
        config: megatron-core's.
        layer_number: not needed.
        attn_mask_type: what a call without a type of its own means.
        attention_type: not needed.
        attention_dropout: must be 0 or None, which takes the config's.
        softmax_scale: None means 1 / sqrt(hn).
        cp_comm_type: not needed.
        pg_collection: this rank's groups; cp is used when the config has context parallelism.

    Raises:
        ValueError: the config asks for what this attention does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _require("attention_dropout", dropout, 0.0)
        _require("window_size", config.window_size, None)
        _require("softmax_type", config.softmax_type, "vanilla")
        _require("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling, False)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        if pg_collection is not None:
            self.tp_group = pg_collection.tp
        self.cache: LayerCache | None = None
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError(
                    f"context_parallel_size is {config.context_parallel_size}, but there is no"
                    " pg_collection with the ranks to exchange keys and values with; pass it"
                )
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends from queries to keys.

        s is this rank's share of the sequence under context parallelism, the whole of it otherwise.

        Args:
            query: [s, b, np, hn] heads of this rank.
            key: [s, b, ng, hn] key heads of this rank; np is a multiple of ng.
            value: [s, b, ng, hn] value heads of this rank.
            attention_mask: [b or 1, 1, s, s of the whole sequence] bool, True where a query must
                not look (megatron-core's sense), causality included; None leaves it to the type.
            attn_mask_type: causal or no_mask; None means the constructor's.
            attention_bias: must be None.
            packed_seq_params: documents that attention does not leave, a `PackedDocuments`; None
                where it does, or where the mask says it.

        Returns:
            [s, b, np * hn].

        Raises:
            ValueError: a bias, packed sequences of another form or another mask type is given, a
                mask with type no_mask or of another shape, causal attention with queries and keys
                of different lengths, or unmasked attention under context parallelism.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        _require("attention_bias", attention_bias, None)
        if mask_type not in _MASKS:
            raise ValueError(
                f"attn_mask_type is {mask_type.name}, but this attention knows "
                f"{' and '.join(mask.name for mask in _MASKS)}"
            )
        is_causal = mask_type == AttnMaskType.causal
        self._check(query, key, attention_mask, is_causal=is_causal)
        if packed_seq_params is not None:
            return self._attend_packed(
                query, key, value, attention_mask, packed_seq_params, is_causal=is_causal
            )
        if self.cache is not None:
            _require("attn_mask_type with a key-value cache", mask_type, AttnMaskType.causal)
            _require("attention_mask with a key-value cache", attention_mask, None)
            _require("cp_group with a key-value cache", self.cp_group, None)
            key, value, seen = self.cache.extend(key, value)
            return self._attend(query, key, value, seen, is_causal=seen is None)
        if self.cp_group is not None:
            return self._attend_in_parts(query, key, value, attention_mask)
        visible = None if attention_mask is None else ~attention_mask
        return self._attend(query, key, value, visible, is_causal=is_causal and visible is None)

    def _check(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None, *, is_causal: bool
    ) -> None:
        """Refuses shapes and masks that would be misread."""
        if is_causal and query.shape[0] != key.shape[0]:
            raise ValueError(
                f"causal attention needs as many queries ({query.shape[0]}) as keys "
                f"({key.shape[0]}); use attn_mask_type no_mask for a single new token"
            )
        if self.cp_group is not None and not is_causal:
            raise ValueError(
                "attn_mask_type is no_mask, but context parallelism splits causal attention alone; "
                "use causal, or a context parallel size of 1"
            )
        if attention_mask is None:
            return
        if not is_causal:
            raise ValueError(
                f"got an attention_mask {list(attention_mask.shape)} with attn_mask_type "
                "no_mask, which needs none and would ignore it; pass None"
            )
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        length, batch = query.shape[:2]
        wanted = [(rows, 1, length, length * ranks) for rows in (batch, 1)]
        if tuple(attention_mask.shape) not in wanted or attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} {attention_mask.dtype}, but must "
                f"be {list(wanted[0])} torch.bool, True where a query must not look"
            )

    def _attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed: PackedSeqParams,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Computes causal attention within documents."""
        if not isinstance(packed, PackedDocuments):
            raise ValueError(
                f"packed_seq_params is {packed!r}, but SDPACoreAttention needs PackedDocuments;"
                " make them with pack_documents"
            )
        _require("attention_mask with packed_seq_params", attention_mask, None)
        _require("causal attention with packed_seq_params", is_causal, True)
        _require("cache with packed_seq_params", self.cache, None)
        if self.cp_group is None and has_kernel(query.device, query.dtype, query.shape[-1]):
            return attend_at_once(query, key, value, packed, self.softmax_scale)
        return attend_one_by_one(
            query, key, value, packed, self.softmax_scale, cp_group=self.cp_group
        )

    def _attend_in_parts(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Computes causal attention of this rank's two chunks of queries over everyone's keys."""
        group = self.cp_group
        key, value = gather_key_value(key, value, group)
        contexts = []
        for rows, seen in query_parts(group.size(), group.rank(), query.shape[0]):
            part = query[rows]
            visible = (
                sees_to_the_end(part.shape[0], seen)
                if attention_mask is None
                else ~attention_mask[:, :, rows, :seen]
            )
            contexts.append(self._attend(part, key[:seen], value[:seen], visible, is_causal=False))
        return torch.cat(contexts)  # [s, b, np * hn]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Any, *, is_causal: bool
    ) -> Tensor:
        """Attends from [s, b, np, hn] to [s of the keys, b, ng, hn]; returns [s, b, np * hn]."""
        scale = self.softmax_scale
        return attend(query, key, value, visible, scale, is_causal=is_causal).contiguous()


@contextlib.contextmanager
def use_cache(model: nn.Module, cache: KeyValueCache) -> Iterator[None]:
    """Makes every attention layer of `model` keep its keys and values in `cache`, for a while.

    Args:
        model: a model chunk, or a pipeline stage, in evaluation mode.
        cache: empty; freed with the caller's last reference, once this ends.

    Raises:
        ValueError: the model is training, a layer's attention cannot keep its keys and values, or
            the model uses a cache already.
    """
    if model.training:
        raise ValueError("the model is training, which needs no cache; call model.eval() first")
    layers = sum(isinstance(module, TransformerLayer) for module in model.modules())
    cores = [module for module in model.modules() if isinstance(module, SDPACoreAttention)]
    if len(cores) != layers:
        raise ValueError(
            f"{len(cores)} of {layers} layers attend with SDPACoreAttention, which alone can keep"
            " keys and values; give the attention that core"
        )
    if any(core.cache is not None for core in cores):
        raise ValueError("the model uses a key-value cache already; end that one first")
    for core in cores:
        core.cache = cache.new_layer()
    try:
        yield
    finally:
        for core in cores:
            core.cache = None


def _require(name: str, value: object, required: object) -> None:
    if value != required:
        raise ValueError(f"{name} is {value!r}, but SDPACoreAttention needs {required!r}")
