"""Compiles the kernels for Hopper, without a GPU, and prints what each takes of a multiprocessor.

Arguments: a folder for what is compiled. A process of its own, because triton decides when it is
imported whether kernels are compiled or interpreted.
"""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_ext.kernels import (
    cross_entropy,
    expert_order,
    gated_unit,
    rms_norm,
    rotated_norm,
    routed_unit,
    router_choice,
    router_losses,
)


class Launch(NamedTuple):
    """Holds a kernel and its constants at a model's size."""

    kernel: Any
    constants: dict[str, Any]


VOCABULARY, WIDTH, FFN = 50280, 2048, 1024
HEADS = rms_norm.Lines(row_stride=16 * 384, group=128, group_stride=384).arguments()
WIDEST = rms_norm.Lines(*(3 * [rms_norm.WIDEST])).arguments()
ROTATED = {
    **{"ROW_STRIDE": 16 * 384, "HEAD_STRIDE": 384, "ROWS_PER_ANGLE": 4},
    **rotated_norm.options(16, 128),
}
EXPERTS, TOPK = 64, 8
ROUTER = {**router_choice.options(EXPERTS), "TOPK": TOPK}
RULES = [{**ROUTER, "IS_NORMALIZED": is_normalized} for is_normalized in (False, True)]
LAUNCHES = [
    Launch(cross_entropy.statistics_kernel, cross_entropy.options(VOCABULARY)),
    Launch(cross_entropy.gradient_kernel, cross_entropy.options(VOCABULARY)),
    Launch(rms_norm.rms_norm_kernel, {**rms_norm.options(WIDTH), **HEADS}),
    Launch(rms_norm.rms_norm_gradient_kernel, {**rms_norm.options(WIDTH), **HEADS}),
    Launch(rms_norm.rms_norm_gradient_kernel, {**rms_norm.options(rms_norm.WIDEST), **WIDEST}),
    Launch(rotated_norm.rotated_norm_kernel, ROTATED),
    Launch(rotated_norm.rotated_norm_gradient_kernel, ROTATED),
    Launch(gated_unit.gated_unit_kernel, gated_unit.options(FFN)),
    Launch(gated_unit.gated_unit_gradient_kernel, gated_unit.options(FFN)),
    Launch(routed_unit.routed_unit_kernel, routed_unit.options(FFN)),
    Launch(routed_unit.routed_unit_gradient_kernel, routed_unit.options(FFN)),
    *(Launch(router_choice.router_kernel, rule) for rule in RULES),
    *(Launch(router_losses.router_gradient_kernel, rule) for rule in RULES),
    Launch(router_losses.router_losses_kernel, ROUTER),
    Launch(expert_order.expert_counts_kernel, expert_order.options(EXPERTS)),
    Launch(expert_order.expert_order_kernel, expert_order.options(EXPERTS)),
]
FP32 = (
    *("weights", "target", "total", "largest", "scale", "parts", "bias", "gates", "scores"),
    *("normalizers", "score_parts", "loss_parts", "slopes", "addend", "grad_gates", "grad_scores"),
    *("grad_addend", "probs", "grad_probs"),
)
INT64 = ("labels", "experts", "rows", "places", "counts", "share_counts")
TYPES = {
    **{f"{name}_ptr": "*fp32" for name in FP32},
    **{f"{name}_ptr": "*i64" for name in INT64},
    **{"count_parts_ptr": "*i32", "is_token_ptr": "*i1", "record_ptr": "*fp64"},
    **dict.fromkeys(("eps", "balance_coeff", "z_coeff", "batch_share"), "fp32"),
}
"""Of what is neither an activation nor a number of rows."""


def resources(launch: Launch, folder: Path) -> dict[str, Any]:
    """Compile one, and return its registers, spilled bytes and shared memory."""
    constants = {**launch.constants}
    options = {"num_warps": constants.pop("num_warps")}
    signature, attributes = {}, {}
    for number, name in enumerate(launch.kernel.arg_names):
        kind = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        signature[name] = "constexpr" if name in constants else kind
        if kind.startswith("*") and name not in constants:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path],
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
    return {
        "kernel": launch.kernel.__name__,
        "threads": 32 * options["num_warps"],
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": binary.metadata.shared,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # triton's own, on a default that will change
    print(json.dumps([resources(launch, Path(sys.argv[1])) for launch in LAUNCHES]))
