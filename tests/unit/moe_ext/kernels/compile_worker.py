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

from moe_ext.kernels import cross_entropy


class Launch(NamedTuple):
    """Holds a kernel, its constants at a model's size, and the dtype of its activations."""

    kernel: Any
    constants: dict[str, Any]
    dtype: str
    fp32: tuple[str, ...] = ()
    """Pointers to fp32, beside those that never point to anything else."""


VOCABULARY = 50280
LAUNCHES = [
    *(
        Launch(kernel, cross_entropy.options(VOCABULARY), dtype, ("total_ptr", "largest_ptr"))
        for kernel in (cross_entropy.statistics_kernel, cross_entropy.gradient_kernel)
        for dtype in ("bf16", "fp32")
    ),
]
ALWAYS = {"labels_ptr": "*i64", "weights_ptr": "*fp32", "target_ptr": "*fp32"}


def resources(launch: Launch, folder: Path) -> dict[str, Any]:
    """Compile one, and return its registers, spilled bytes and shared memory."""
    constants = {**launch.constants}
    options = {name: constants.pop(name) for name in ("num_warps",)}
    signature, attributes = {}, {}
    for number, name in enumerate(launch.kernel.arg_names):
        pointer = "*fp32" if name in launch.fp32 else f"*{launch.dtype}"
        kind = ALWAYS.get(name, pointer if name.endswith("_ptr") else "i32")
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
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", told.stdout))
    return {
        "kernel": launch.kernel.__name__,
        "dtype": launch.dtype,
        "threads": 32 * options["num_warps"],
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": int(found["SHARED"]),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # triton's own, on a default that will change
    print(json.dumps([resources(launch, Path(sys.argv[1])) for launch in LAUNCHES]))
