"""Adapts grouped products of other projects, where they are installed: MegaBlocks and TE.

Both want the tokens per expert on the host, so a step waits for the device once a layer. They are
imported when they are used.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from moe_ext.experts.gate import GatedActivation
from moe_ext.experts.interface import ExpertFunction, ProjectionFunction, Use

_INSTALL_TE = "pip install 'megatron-moe[te]'"
# No extra can name them: MegaBlocks' release pins a torch that is older than ours.
_INSTALL_MEGABLOCKS = "pip install --no-deps --no-build-isolation megablocks grouped_gemm"


def megablocks_problem(use: Use) -> str | None:
    """Says why MegaBlocks cannot be used, or None."""
    if use.device_type != "cuda" or use.dtype != torch.bfloat16:
        return (
            f"computes bf16 on a GPU only; this is {use.dtype} on {use.device_type}; use 'grouped'"
        )
    missing = [name for name in ("megablocks", "grouped_gemm") if not _is_installed(name)]
    if missing:
        return f"needs {' and '.join(missing)}: {_INSTALL_MEGABLOCKS}, or use 'grouped'"
    return None


def te_problem(use: Use) -> str | None:
    """Says why Transformer Engine cannot be used, or None."""
    if use.device_type != "cuda":
        return f"computes on a GPU, not on {use.device_type}; use 'grouped'"
    if not _is_installed("transformer_engine"):
        return f"needs transformer_engine: {_INSTALL_TE}, or use 'grouped'"
    return None


def experts_of(project: ProjectionFunction) -> ExpertFunction:
    """Makes SwiGLU experts over sorted rows of a projection; the contract is `loop_experts`'s.

    Args:
        project: with the contract of `loop_projection`.
    """

    def experts(
        hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> Tensor:
        projected = project(hidden, weight1.flatten(1, 2), tokens_per_expert)  # [t, 2f]
        product: Tensor = GatedActivation.apply(projected, probs)  # [t, f]
        return project(product, weight2, tokens_per_expert)  # [t, h]

    return experts


def megablocks_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix, on the grouped GEMM that MegaBlocks uses."""
    from megablocks import grouped_gemm_util  # type: ignore[import-not-found]

    sizes = tokens_per_expert.to("cpu", torch.int64)
    output: Tensor = grouped_gemm_util.ops.gmm(rows, weight, sizes, trans_b=True)
    return output


def te_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix, on TE's grouped linear layers."""
    layer = _te_layer(weight.shape, weight.dtype)
    names = {f"weight{number}": matrix for number, matrix in enumerate(weight.unbind(0))}
    sizes: list[int] = tokens_per_expert.tolist()
    output: Tensor = torch.func.functional_call(layer, names, (rows, sizes))
    return output


@functools.cache
def _te_layer(shape: torch.Size, dtype: torch.dtype) -> Any:
    """Builds TE's layer of [el, m, n] matrices; its own are never used, so they take no memory."""
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    number, outputs, inputs = shape
    return te.GroupedLinear(number, inputs, outputs, bias=False, params_dtype=dtype, device="meta")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
