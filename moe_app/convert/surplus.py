"""Leaves out of an import what a checkpoint holds besides its weights, once it is seen to agree."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory
from moe_ext.config import MoEModelConfig
from moe_ext.convert import harmless_fields
from moe_ext.layers.rotary import inverse_frequencies

logger = logging.getLogger("convert")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_PER_COMPARISON = 8192
_FREQUENCY_TOLERANCE = 1e-5
"""Relative; devices differ in the last bits of a power."""


def leave_out_surplus(
    source: HFDirectory,
    is_rotary_buffer: Callable[[str, MoEModelConfig], bool],
    model: MoEModelConfig,
) -> dict[str, Any]:
    """Compare tensors and fields that the model does not need, leave them out, and log it.

    Args:
        source: the checkpoint.
        is_rotary_buffer: tells names of RoPE's frequencies.
        model: the architecture.

    Returns:
        What the report says of them; empty if there are none.

    Raises:
        CheckpointError: a tensor is not what the model computes with.
    """
    fields = harmless_fields(source.config)
    tensors: dict[str, str] = {}
    if HEAD in source.tensors and not model.untie_embeddings_and_output_weights:
        _compare_head(source)
        tensors[HEAD] = "equals the embedding, to which it is tied"
    for name in source.tensors:
        if is_rotary_buffer(name, model):
            _compare_frequencies(source, name, model)
            tensors[name] = "equals what rope_theta gives"
    if not fields and not tensors:
        return {}
    for name in tensors:
        source.leave_out(name)
    logger.info("left out, as the model is the same without: %s", _listed(fields, tensors))
    return {"left_out": {"config": fields, "tensors": tensors}}


def _compare_head(source: HFDirectory) -> None:
    """Refuse an output layer that differs from the embedding it is tied to."""
    shapes = {
        name: source.tensors[name].shape for name in (HEAD, EMBEDDING) if name in source.tensors
    }
    is_same = len(set(shapes.values())) == 1 and EMBEDDING in shapes
    rows = shapes[HEAD][0] if is_same and shapes[HEAD] else 0
    for start in range(0, rows, _ROWS_PER_COMPARISON):
        count = min(_ROWS_PER_COMPARISON, rows - start)
        head, embedding = (
            source.read(name, start=start, count=count).float() for name in (HEAD, EMBEDDING)
        )
        is_same = is_same and torch.equal(head, embedding)
    if not is_same:
        raise CheckpointError(
            f"{source.path} holds lm_head.weight, but its config.json says tie_word_embeddings"
            " true, which makes the output layer the embedding, and the two differ; set"
            " tie_word_embeddings to false if the output layer is one of its own, or remove the"
            " tensor if the embedding is right"
        )


def _compare_frequencies(source: HFDirectory, name: str, model: MoEModelConfig) -> None:
    """Refuse frequencies of RoPE that are not those of its base."""
    count = model.head_size // 2
    is_same = source.tensors[name].shape == (count,)
    if is_same:
        found = source.read(name, start=0, count=count)
        is_same = torch.allclose(
            found.double(),
            inverse_frequencies(model.head_size, model.rotary_base).double(),
            rtol=max(_FREQUENCY_TOLERANCE, torch.finfo(found.dtype).eps),
            atol=0.0,
        )
    if not is_same:
        raise CheckpointError(
            f"{source.path} holds {name}, which is not what rope_theta {model.rotary_base:g} gives"
            f" for {count} frequencies; the weights were trained with other ones; correct"
            " rope_theta in config.json, or remove the tensor if it is wrong"
        )


def _listed(fields: dict[str, Any], tensors: dict[str, str]) -> str:
    """List what is left out in a line: tensors of the same last name once, with their count."""
    counts: dict[str, int] = {}
    for name in tensors:
        short = name if name == HEAD else name.partition("rotary_emb.")[1] + "inv_freq"
        counts[short] = counts.get(short, 0) + 1
    parts = [f"{name} of config.json" for name in fields]
    parts += [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    return ", ".join(parts)
