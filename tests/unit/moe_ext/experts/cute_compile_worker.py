"""Hands the calls of cute_products.py to QuACK, without a GPU, and prints what became of them.

Twice: to QuACK's own reference functions and the functions of its epilogues, on float64, beside
plain_products.py; and to its compiler, for the GPU that QUACK_ARCH and CUTE_DSL_ARCH name. A
process of its own, because QuACK reads both when it is imported. Arguments: a folder.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quack.gemm
import quack.gemm_interface as interface
import quack.gemm_runtime.host
import torch
import torch.nn.functional as F
import triton
from quack.epilogue.library import dgated_mod
from torch import Tensor

from moe_ext.experts import cute_epilogue, cute_products
from moe_ext.experts.cute_products import RaggedRows
from tests.unit.moe_ext.experts import plain_products

T, K, E, H, FFN = 40, 2, 3, 64, 32
N = T * K


def make_rows() -> RaggedRows:
    """The second of three experts has no row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(N, generator=generator).to(torch.int32)
    return RaggedRows(
        starts=torch.tensor([0, 30, 30, N], dtype=torch.int32),
        number=N,
        rows=rows,
        places=rows.argsort().to(torch.int32),
        topk=K,
    )


def calls(
    dtype: torch.dtype, buffer_dtype: torch.dtype
) -> dict[str, Callable[[Any], list[Tensor]]]:
    """List what the backend asks of products, as functions of a module that has them."""
    rows = make_rows()
    lines = rows.lines("token")
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens, placed, narrow, pairs = random(T, H), random(N, H), random(N, FFN), random(N, 2 * FFN)
    weight1, weight2 = random(E, 2, FFN, H), random(E, H, FFN)
    stacked = weight1.flatten(1, 2)
    gates = random(N).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def gated(of: Any, source: Tensor, at: Tensor | None, is_kept: bool) -> list[Tensor]:
        found = of.gated_product(source, weight1, gates, rows, at, is_kept=is_kept)
        return [each for each in found if each is not None]

    def gradient(
        of: Any, left: Tensor, right: Tensor, at: Tensor | None, *, is_added: bool, is_gated: bool
    ) -> list[Tensor]:
        shape = (
            (E, right.shape[1], left.shape[1]) if is_gated else (E, left.shape[1], right.shape[1])
        )
        out = torch.full(shape, 2.0, dtype=buffer_dtype if is_added else dtype)
        of.grouped_weight_gradient(
            left, right, rows, at,
            out=out.mT if is_gated else out, accumulate=is_added, is_interleaved=is_gated,
        )  # fmt: skip
        return [out]

    found: dict[str, Callable[[Any], list[Tensor]]] = {
        "gated product": lambda of: gated(of, tokens, lines, True),
        "gated product, kept nothing": lambda of: gated(of, tokens, lines, False),
        "gated product, sorted": lambda of: gated(of, placed, None, True),
        "gated gradient": lambda of: list(
            of.gated_product_gradient(tokens, weight2, gates, pairs, rows, lines)
        ),
        "gated gradient, sorted": lambda of: list(
            of.gated_product_gradient(placed, weight2, gates, pairs, rows, None)
        ),
        "product": lambda of: [of.grouped_product(narrow, weight2, rows, None)],
        "product, gathered": lambda of: [of.grouped_product(tokens, stacked, rows, lines)],
        "product, transposed": lambda of: [
            of.grouped_product(tokens, weight2, rows, lines, is_transposed=True)
        ],
        "product, interleaved": lambda of: [
            of.grouped_product(pairs, stacked, rows, None, is_transposed=True, is_interleaved=True)
        ],
    }
    for name, left, at in (("gathered", tokens, lines), ("sorted", placed, None)):
        for how, is_added in (("written", False), ("added", True)):
            for right, is_gated in ((narrow, False), (pairs, True)):
                kind = "weight gradient of pairs" if is_gated else "weight gradient"
                found[f"{kind}, {name}, {how}"] = functools.partial(
                    gradient, left=left, right=right, at=at, is_added=is_added, is_gated=is_gated
                )
    return found


def reference_errors() -> dict[str, float]:
    """Compare what QuACK's references make of each call with plain torch, by norm."""
    errors = {}
    for name, call in calls(torch.float64, torch.float64).items():
        found, wanted = call(cute_products), call(plain_products)
        assert len(found) == len(wanted)
        distances = (float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        errors[name] = max(distances)
    return errors


def use_references() -> None:
    """Put QuACK's references in the place of its kernels, as far as it has them."""

    def multiply(*operands: Tensor, out: Tensor, tuned: bool, **options: Any) -> Tensor:
        assert not tuned
        return interface.gemm_ref(*operands, out=out, **options)

    def weight_gradient(
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        concat_layout: tuple[str, ...] | None,
        **options: Any,
    ) -> None:
        # The reference splits rows; the kernel, what is not dense: here the columns.
        if concat_layout == ("out",):
            assert out.stride(-2) == 1
            first, second = out.chunk(2, dim=-1)
            both = torch.stack([first, second], dim=-1).flatten(-2)  # interleaved
        else:
            both = out.clone()
        if options.pop("is_added"):
            interface.gemm_add_ref(left, right, both.clone(), out=both, **options)
        else:
            interface.gemm_ref(left, right, out=both, **options)
        out.copy_(
            both if concat_layout is None else torch.cat([both[..., 0::2], both[..., 1::2]], -1)
        )

    def either(*operands: Tensor, **options: Any) -> Any:
        if "cu_seqlens_k" in options:
            del options["tuned"]
            return weight_gradient(*operands, is_added=False, **options)
        return multiply(*operands, **options)

    def added(*operands: Tensor, tuned: bool, **options: Any) -> None:
        assert not tuned
        weight_gradient(*operands, is_added=True, **options)

    interface.gemm, interface.gemm_add_inplace = either, added
    interface.gemm_dgated = gated_gradient
    cute_epilogue.gated_swiglu = GatedReference(cute_epilogue.gated_swiglu.fn)


class GatedReference:
    """Computes our epilogue's function on tensors, over QuACK's reference of a product."""

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self._function, self._plan_cache = function, dict[object, object]()

    def __call__(
        self, source: Tensor, matrix: Tensor, *, out: dict[str, Tensor], store_d: bool,
        tuned: bool, gates: Tensor, **options: Any,
    ) -> None:  # fmt: skip
        """Write what the epilogue returns."""
        assert not tuned and store_d == ("D" in out)
        projected = interface.gemm_ref(source, matrix, **options)
        found = self._function(projected, gates.to(projected.dtype)[:, None])
        for name, into in out.items():
            into.copy_(found[name])


def gated_gradient(
    upstream: Tensor, weight: Tensor, pairs: Tensor, *, activation: str, dx_out: Tensor,
    postact_out: Tensor, colvec_scale: Tensor, colvec_reduce: bool, dynamic_scheduler: bool,
    tuned: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute QuACK's epilogue function of gemm_dgated on tensors, over its reference product."""
    assert activation == "swiglu" and colvec_reduce and not dynamic_scheduler and not tuned
    grad = interface.gemm_ref(upstream, weight, **options)
    epilogue = dgated_mod(activation, has_scale=True, has_reduce=True)
    found = epilogue.fn(grad, pairs, colvec_scale.to(grad.dtype)[:, None])
    dx_out.copy_(found["D"])
    postact_out.copy_(found["mAuxOut"])
    product, factor = found["mColVecReduce"]
    return dx_out, postact_out, (product * factor).sum(dim=1)


def on_tensors(function: Callable[..., Any]) -> None:
    """Let an epilogue's function compute on tensors whose columns are paired."""

    def dswiglu(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        product = F.silu(gate) * up
        by_gate, by_up = torch.autograd.grad(product, [gate, up], grad)
        return by_gate, by_up, product.detach()

    function.__globals__.update(
        unpack=lambda both: (both[:, 0::2], both[:, 1::2]),
        pack=lambda first, second: torch.stack([first, second], dim=-1).flatten(-2),
        swiglu=lambda gate, up: F.silu(gate) * up,
        dgate=dswiglu,
    )


def compile_all(folder: Path) -> list[dict[str, Any]]:
    """Compile what each call launches; return each kernel's registers and spilled bytes."""

    def launch(plan: Any, *_: Any) -> None:
        assert plan.compiled_fn is not None

    for module in (quack.gemm, quack.gemm_runtime.host):
        module.launch_gemm = launch
        module.get_max_active_clusters = lambda *_, **__: 66
    # What torch registers for CUDA alone.
    interface.gemm_add_inplace_op = interface.gemm_add_inplace_op._init_fn
    kernels = []
    for name, call in calls(torch.bfloat16, torch.float32).items():
        if "sorted" in name:
            continue  # the same without an index, and seconds each
        call(cute_products)
        for path in list(folder.glob("*.cubin")):  # the next may get the same name
            kernels.append({"call": name, **resources(path.rename(folder / "kernel"))})
    return kernels


def resources(cubin: Path) -> dict[str, int]:
    """Return registers of a thread and bytes spilled."""
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
    }


if __name__ == "__main__":
    compiled = compile_all(Path(sys.argv[1]))
    use_references()
    on_tensors(cute_epilogue.gated_swiglu._function)
    on_tensors(dgated_mod("swiglu", has_scale=True, has_reduce=True).fn)
    print(json.dumps({"kernels": compiled, "errors": reference_errors()}))
