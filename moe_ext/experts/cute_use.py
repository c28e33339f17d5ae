"""Says where the `cute` backend can be used, and why it cannot elsewhere."""

import functools
import importlib.util
import sys

import torch

from moe_ext.experts.interface import Use

_OLDEST_PYTHON = (3, 12)
_OLDEST_GPU = (9, 0)
"""Compute capability of Hopper, the first with TMA and products of warp groups."""
_ROW_ELEMENTS = 8
"""TMA copies rows of whole 16-byte blocks: 8 elements of bf16."""
_INSTALL = "pip install 'megatron-moe[cute]'"


def cute_problem(use: Use) -> str | None:
    """Says why QuACK's products cannot be used, or None; tries them where they can be."""
    if use.device_type != "cuda":
        return f"computes on a GPU, not on {use.device_type}; use 'grouped'"
    if use.dtype != torch.bfloat16:
        return f"multiplies bfloat16, not {use.dtype}; use 'triton' or 'grouped'"
    odd = [width for width in use.widths if width % _ROW_ELEMENTS]
    if odd:
        return (
            f"needs rows of a multiple of {_ROW_ELEMENTS} numbers, but this rank's experts have"
            f" some of {odd[0]}; change hidden_size or moe_ffn_hidden_size, or use 'triton'"
        )
    if use.capability is not None and use.capability < _OLDEST_GPU:
        found, wanted = (".".join(map(str, each)) for each in (use.capability, _OLDEST_GPU))
        return f"needs compute capability {wanted}, and the GPU has {found}; use 'grouped'"
    missing = _missing()
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "finds no GPU; use 'grouped'"
    return _trial_problem(torch.cuda.current_device())


def _missing() -> str | None:
    """Says what this Python lacks, or None."""
    if sys.version_info < _OLDEST_PYTHON:
        found, wanted = (
            ".".join(map(str, each)) for each in (sys.version_info[:2], _OLDEST_PYTHON)
        )
        return f"needs Python {wanted}, and this is {found}; use 'triton' or 'grouped'"
    names = [name for name in ("quack", "triton") if importlib.util.find_spec(name) is None]
    if names:
        return f"needs {' and '.join(names)}: {_INSTALL}, or use 'grouped'"
    return None


@functools.cache
def _trial_problem(device: int) -> str | None:
    """Tries the products once on a device; says why they cannot be used, or None."""
    from moe_ext.experts import cute_trial

    problem = cute_trial.find_problem(torch.device("cuda", device))
    return None if problem is None else f"{problem}; use 'triton' or 'grouped'"
