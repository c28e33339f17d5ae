"""Make random transformers models, and copy their weights to native ones through the converter."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    PreTrainedModel,
)

from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES, ExpertLayout, Piece
from moe_ext.layers.lora import is_adapter

OLMOE_TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "pad_token_id": None,  # transformers gives a padding token's embedding no gradient
}
OLMO_TINY: dict[str, Any] = {
    **{name: value for name, value in OLMOE_TINY.items() if "experts" not in name},
    "intermediate_size": 28,
}
JETMOE_TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_channels": 10,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def random_model(family: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Make a transformers model whose every weight matters: no small matrix, no norm of ones."""
    if family == "olmoe":
        # The plain loop over experts; the default, a grouped GEMM, does not support odd widths.
        plain = OlmoeConfig(**{**OLMOE_TINY, "experts_implementation": "eager", **config})
        model: PreTrainedModel = OlmoeForCausalLM(plain)
    elif family == "olmo":
        model = OlmoForCausalLM(OlmoConfig(**{**OLMO_TINY, **config}))
    else:
        model = JetMoeForCausalLM(JetMoeConfig(**{**JETMOE_TINY, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.4 * torch.randn(parameter.shape, generator=generator))
            else:
                # Outputs about as large as inputs, so that logits are a few units.
                std = parameter.shape[-1] ** -0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_tokens(config: Any, *, batch: int, length: int, seed: int = 1) -> Tensor:
    """Draw token ids [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def window(piece: Piece) -> tuple[slice, ...]:
    """Return the piece's index range in its native tensor."""
    return tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.block, strict=True))


def to_native(
    family: str, model: MoEModelConfig, layout: ExpertLayout, hf: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert all tensors to native ones; fails if an element is set twice or never."""
    found: dict[str, Tensor] = {}
    times_set: dict[str, Tensor] = {}
    for piece in FAMILIES[family].pieces(model, layout):
        sources = [hf[part.name][part.start : part.start + part.count] for part in piece.sources]
        block = piece.to_native(sources)
        assert block.shape == piece.block
        full = found.setdefault(piece.key, torch.zeros(piece.shape, dtype=block.dtype))
        count = times_set.setdefault(piece.key, torch.zeros(piece.shape, dtype=torch.int8))
        full[window(piece)] = block
        count[window(piece)] += 1
    assert all((count == 1).all() for count in times_set.values())
    return found


def to_hf(
    family: str, model: MoEModelConfig, layout: ExpertLayout, native: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert all native tensors to Hugging Face ones."""
    found: dict[str, Tensor] = {}
    for piece in FAMILIES[family].pieces(model, layout):
        block = native[piece.key][window(piece)]
        for part, tensor in zip(piece.sources, piece.to_hf(block), strict=True):
            assert tensor.shape == part.part_shape
            full = found.setdefault(part.name, torch.full(part.shape, torch.nan))
            full[part.start : part.start + part.count] = tensor
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def shards(chunks: Sequence[nn.Module]) -> Iterator[ShardedTensor]:
    """Yield every weight of the model chunks with its place in the global tensor."""
    for chunk in chunks:
        for value in nested_values(chunk.sharded_state_dict()):  # type: ignore[operator]
            built = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in nested_values({"part": built}):
                if isinstance(part, ShardedTensor):
                    yield part


def place(shard: ShardedTensor) -> tuple[int | slice, ...]:
    """Return the indices of the shard in the global tensor; its shape lacks the layer axis."""
    stacked = shard.prepend_axis_num
    local = shard.data.shape
    return (
        *shard.global_offset[:stacked],
        *(slice(o, o + n) for o, n in zip(shard.global_offset[stacked:], local, strict=True)),
    )


def fill(chunks: Sequence[nn.Module], native: Mapping[str, Tensor]) -> None:
    """Copy to each weight its part of the global native tensors; all but adapters must be known."""
    used = set()
    with torch.no_grad():
        for shard in shards(chunks):
            if is_adapter(shard.key):
                continue
            assert shard.global_shape == native[shard.key].shape, shard.key
            shard.data.copy_(native[shard.key][place(shard)])
            used.add(shard.key)
    assert used <= native.keys()


def adapters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the adapters' native tensors, for chunks that one rank holds entirely."""
    found: dict[str, Tensor] = {}
    for shard in shards(chunks):
        if is_adapter(shard.key):
            full = found.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))
            full[place(shard)] = shard.data
    return found


def gradients(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the full gradient of every native weight, for chunks that one rank holds entirely."""
    parameters = {
        parameter.untyped_storage().data_ptr(): parameter
        for chunk in chunks
        for parameter in chunk.parameters()
    }
    found: dict[str, Tensor] = {}
    for shard in shards(chunks):
        parameter = parameters[shard.data.untyped_storage().data_ptr()]
        assert parameter.grad is not None, shard.key
        start = shard.data.storage_offset() - parameter.storage_offset()
        mine = parameter.grad.flatten()[start : start + shard.data.numel()]  # gate and up are two
        full = found.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))
        full[place(shard)] = mine.view(shard.data.shape)
    return found
