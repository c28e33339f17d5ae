"""Merges adapters of low rank into the matrices they adapt, and maps them to peft's form.

peft is the Hugging Face library of adapters (0.21). Letters are those of docs/glossary.md; native
tensors of a layer are stacked, [L, ...].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.layers.lora import LoRA
from moe_ext.parameter_groups import group_of

ReadBlock = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
"""(name, start, size) to that block of a native tensor."""

_QKV = "decoder.layers.self_attention.linear_qkv.weight"
_KV = "decoder.layers.self_attention.linear_kv.weight"
_ATTENTION = "decoder.layers.self_attention"
_EXPERTS = "decoder.layers.mlp.experts"
_ADAPTERS = {
    _QKV: f"{_ATTENTION}.linear_qkv.lora",
    f"{_ATTENTION}.linear_proj.weight": f"{_ATTENTION}.linear_proj.lora",
    _KV: f"{_ATTENTION}.linear_kv.lora",
    f"{_ATTENTION}.experts.weight_q": f"{_ATTENTION}.experts.lora_q",
    f"{_ATTENTION}.experts.weight_o": f"{_ATTENTION}.experts.lora_o",
    f"{_ATTENTION}.router.weight": f"{_ATTENTION}.router.lora",
    "decoder.layers.mlp.router.weight": "decoder.layers.mlp.router.lora",
    f"{_EXPERTS}.weight1": f"{_EXPERTS}.lora1",
    f"{_EXPERTS}.weight2": f"{_EXPERTS}.lora2",
}
"""Native matrices that can have an adapter, and what theirs is called; `.a` and `.b` follow."""


def adapter_of(key: str, model: MoEModelConfig, lora: LoRA) -> str | None:
    """Returns the name of the adapter of a native matrix; None where it has none."""
    name = _ADAPTERS.get(key)
    return name if name is not None and group_of(key, model) in lora.targets else None


def adapter_shapes(
    key: str, shape: tuple[int, ...], model: MoEModelConfig, lora: LoRA
) -> dict[str, tuple[int, ...]]:
    """Returns the native names and shapes of the adapter of a matrix; empty where it has none.

    Args:
        key: native name of the matrix.
        shape: of it, [L, ..., out, in].
        model: the architecture.
        lora: the adapters.
    """
    name = adapter_of(key, model, lora)
    if name is None:
        return {}
    # Experts have an A each, and the gate's and the up projection's rows share it.
    experts = shape[1:2] if _is_stacked(key) else ()
    parts = (3,) if key == _QKV else ()
    return {
        f"{name}.a": (shape[0], *experts, *parts, lora.rank, shape[-1]),
        f"{name}.b": (*shape[:-1], lora.rank),
    }


def delta(
    key: str,
    offset: tuple[int, ...],
    block: tuple[int, ...],
    *,
    model: MoEModelConfig,
    lora: LoRA,
    read: ReadBlock,
) -> Tensor | None:
    """Computes what an adapter adds to a whole matrix, in fp32; None where there is none.

    Args:
        key: native name of the matrix.
        offset: start of the block in the native tensor.
        block: its shape: the matrix of one layer and, of experts, one expert.
        model: the architecture.
        lora: the adapters.
        read: reads blocks of the adapters.

    Returns:
        [block].
    """
    name = adapter_of(key, model, lora)
    if name is None:
        return None
    lead = 2 if _is_stacked(key) else 1
    parts = (3,) if key == _QKV else ()
    zeros = (0,) * (len(parts) + 2)
    a = read(f"{name}.a", (*offset[:lead], *zeros), (*block[:lead], *parts, lora.rank, block[-1]))
    b = read(f"{name}.b", (*offset[:-1], 0), (*block[:-1], lora.rank))
    first = a.float().reshape(-1, block[-1])  # [parts * r, in]
    second = b.float().reshape(-1, lora.rank)  # [out, r]
    if parts:
        second = _spread(second, model)  # [out, 3 r]
    return (second @ first).mul_(lora.scale).reshape(block)


def _spread(b: Tensor, model: MoEModelConfig) -> Tensor:
    """Puts each row of B [rows, r] in the columns of its projection: [rows, 3 r], else zero."""
    rank = b.shape[1]
    wide = b.new_zeros(len(b), 3 * rank)
    for part, rows in enumerate(qkv_rows(model)):
        wide[rows, part * rank : (part + 1) * rank] = b[rows]
    return wide


def qkv_rows(model: MoEModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows of the joint matrix that are q's, k's and v's, in Hugging Face's order."""
    groups = model.num_query_groups or model.num_attention_heads
    size = model.head_size
    sizes = (model.num_attention_heads // groups * size, size, size)
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)  # [groups, rows of a group]
    q, k, v = (part.flatten() for part in rows.split(sizes, dim=1))
    return q, k, v


def _is_stacked(key: str) -> bool:
    """Returns whether a native matrix is one of several experts'."""
    return ".experts.weight" in key


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Says what a native matrix is called in peft's files."""

    key: str
    """Native name of the matrix."""
    module: str
    """Name within the layer; {} stands for the projection of a joint matrix."""
    parts: tuple[str, ...] = ("",)
    """Projections of a joint matrix."""
    parameter: str | None = None
    """Name of the parameter for `target_parameters`; None for a module of `target_modules`."""


_PROJECTIONS = (
    _Target(key=_QKV, module="self_attn.{}", parts=("q_proj", "k_proj", "v_proj")),
    _Target(key=f"{_ATTENTION}.linear_proj.weight", module="self_attn.o_proj"),
)

_TARGETS: dict[str, tuple[_Target, ...]] = {
    "olmo": _PROJECTIONS,
    "olmoe": (
        *_PROJECTIONS,
        _Target(
            key="decoder.layers.mlp.router.weight",
            module="mlp.gate",
            parameter="mlp.gate.weight",
        ),
        # peft nests the two: the parameter that is named first is wrapped inside.
        _Target(
            key=f"{_EXPERTS}.weight1",
            module="mlp.experts.base_layer",
            parameter="mlp.experts.gate_up_proj",
        ),
        _Target(
            key=f"{_EXPERTS}.weight2",
            module="mlp.experts",
            parameter="mlp.experts.down_proj",
        ),
    ),
    "jetmoe": (
        _Target(key=_KV, module="self_attention.kv_proj"),
        _Target(
            key=f"{_ATTENTION}.experts.weight_q",
            module="self_attention.experts.input_linear",
            parameter="self_attention.experts.input_linear.weight",
        ),
        _Target(
            key=f"{_ATTENTION}.experts.weight_o",
            module="self_attention.experts.output_linear",
            parameter="self_attention.experts.output_linear.weight",
        ),
        _Target(
            key=f"{_ATTENTION}.router.weight",
            module="self_attention.experts.router.layer",
        ),
        _Target(
            key="decoder.layers.mlp.router.weight",
            module="mlp.router.layer",
        ),
        _Target(
            key=f"{_EXPERTS}.weight1",
            module="mlp.input_linear",
            parameter="mlp.input_linear.weight",
        ),
        _Target(
            key=f"{_EXPERTS}.weight2",
            module="mlp.output_linear",
            parameter="mlp.output_linear.weight",
        ),
    ),
}
"""Matrices by family, those of a layer's experts in the order in which peft wraps them."""


def peft_config(family: str, model: MoEModelConfig, lora: LoRA, base: str | None) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
        family: of the model, a name in `FAMILIES`.
        model: the architecture.
        lora: the adapters.
        base: name or directory of the model that they adapt; None leaves it open.
    """
    modules, parameters = [], []
    for target in _adapted(family, model, lora):
        if target.parameter is not None:
            parameters.append(target.parameter)
        else:
            modules += [target.module.format(part) for part in target.parts]
    # A regular expression, because peft takes a list to name all modules that end so.
    pattern = "|".join(module.replace(".", r"\.") for module in modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*\.layers\.\d+\.({pattern})" if modules else [],
        "target_parameters": parameters or None,
    }


def peft_tensors(
    family: str, model: MoEModelConfig, lora: LoRA, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of each tensor of adapter_model.safetensors, a layer at a time.

    Args:
        family: of the model, a name in `FAMILIES`.
        model: the architecture.
        lora: the adapters.
        read: a native tensor, all layers of it, by its name.
    """
    for target in _adapted(family, model, lora):
        name = _ADAPTERS[target.key]
        for layer, (a, b) in enumerate(zip(read(f"{name}.a"), read(f"{name}.b"), strict=True)):
            for part, (first, second) in zip(
                target.parts, _parts(target.key, a, b, model), strict=True
            ):
                module = f"base_model.model.model.layers.{layer}.{target.module.format(part)}"
                yield f"{module}.lora_A.weight", first.contiguous()
                yield f"{module}.lora_B.weight", second.contiguous()


def _parts(
    key: str, a: Tensor, b: Tensor, model: MoEModelConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields peft's A and B of each projection of one layer's adapter."""
    if key == _QKV:
        for first, rows in zip(a, qkv_rows(model), strict=True):
            yield first, b[rows]
    elif key == _KV:  # each head's key before its value; Hugging Face has all keys first
        groups = model.num_query_groups or model.num_attention_heads
        keys, values = b.unflatten(0, (groups, 2, -1)).unbind(1)
        yield a, torch.cat((keys.flatten(0, 1), values.flatten(0, 1)))
    elif _is_stacked(key):
        # peft reads A [e r, in] as (e, r, in), and B [out, r e] with the expert innermost.
        matrices = b.flatten(1, -2)  # [e, out, r]
        yield a.flatten(0, 1), matrices.permute(1, 2, 0).flatten(1)
    else:
        yield a, b


def _adapted(family: str, model: MoEModelConfig, lora: LoRA) -> list[_Target]:
    return [each for each in _TARGETS[family] if adapter_of(each.key, model, lora) is not None]


def merged(block: Tensor, added: Tensor | None) -> Tensor:
    """Returns a matrix with what its adapter adds, fp32; without one the matrix as it is."""
    return block if added is None else block.float() + added


def adapter_tensors(
    shapes: Mapping[str, tuple[int, ...]], model: MoEModelConfig, lora: LoRA | None
) -> dict[str, tuple[int, ...]]:
    """Returns native names and shapes of all adapters of a model.

    Args:
        shapes: of its native weights.
        model: the architecture.
        lora: the adapters; None for none.
    """
    if lora is None:
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        found |= adapter_shapes(key, shape, model, lora)
    return found
