"""Imports triton where it is installed, and defines the decorator of kernels.

Modules with kernels can be imported where triton is not installed; their kernels cannot be run
there. `is_available` says which of the two it is.
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Not swallowed: `is_available` names it, and the remedy.
    triton = tl = None

# Triton decides when a kernel is decorated, and never again, whether it is to be interpreted.
IS_INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

# The same as a constant that kernels can read.
INTERPRETED = None if triton is None else tl.constexpr(IS_INTERPRETED)


def jit(function: Callable[..., Any]) -> Any:
    """Applies `triton.jit`; without triton the function stays as it is."""
    if triton is None:
        return function
    # How many rows there are changes from step to step; that is no reason to compile again.
    return triton.jit(function, do_not_specialize=["num_rows"])


def is_available() -> tuple[bool, str]:
    """Says whether kernels can be run here, and how; or why not, and the remedy."""
    if triton is None:
        return False, "triton is not installed; pip install 'megatron-moe[triton]'"
    if IS_INTERPRETED or torch.cuda.is_available():
        return True, "interpreted" if IS_INTERPRETED else "compiled"
    return False, (
        "triton finds no GPU; set TRITON_INTERPRET=1 before Python starts to run its kernels, "
        "slowly, on the CPU, or use expert_backend 'grouped'"
    )
