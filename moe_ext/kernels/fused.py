"""Decides where fused kernels compute, and where torch does."""

import functools
from typing import Literal

import torch
from torch import Tensor

FusedKernels = Literal["auto", "off"]
"""What `MoEModelConfig.fused_kernels` can say: where they can be used, or nowhere."""

_DTYPES = (torch.bfloat16, torch.float32)
_OLDEST = (8, 0)
"""Compute capability of the A100, the first with arithmetic in bf16."""


def setting_of(config: object) -> FusedKernels:
    """Returns what a layer's config says; one of megatron-core alone says nothing."""
    setting: FusedKernels = getattr(config, "fused_kernels", "auto")
    return setting


def takes(setting: FusedKernels, *tensors: Tensor) -> bool:
    """Says whether a kernel computes with these tensors; torch does otherwise.

    Args:
        setting: of the run.
        tensors: what it would read.
    """
    if setting == "off" or not all(each.is_cuda for each in tensors):
        return False
    return all(each.dtype in _DTYPES for each in tensors) and _problem() is None


def describe(setting: FusedKernels, device_type: str) -> str:
    """Says for the log which of the two computes on a device, and why."""
    if setting == "off":
        return "fused kernels: none, fused_kernels is 'off'"
    problem = problem_on(device_type)
    return f"fused kernels: {'where they can' if problem is None else f'none, {problem}'}"


def problem_on(device_type: str) -> str | None:
    """Returns why kernels cannot be used on this process's device of a type, or None."""
    return _problem() if device_type == "cuda" else f"they need a GPU and this is {device_type}"


@functools.cache
def _problem() -> str | None:
    """Says why this process's GPU cannot run kernels, or None; each is tried once."""
    # triton is imported where it is used: it takes a quarter of a second.
    from moe_ext.kernels import triton_jit

    can_run, reason = triton_jit.is_available()
    if not can_run:
        return reason
    if torch.version.cuda is None:
        return "they have been made for CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return f"they need compute capability 8.0, and the GPU has {capability[0]}.{capability[1]}"
    from moe_ext.kernels import trial

    return trial.find_problem(torch.device("cuda"))
