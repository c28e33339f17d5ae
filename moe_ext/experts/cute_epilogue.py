"""Defines QuACK's epilogue of the first product of SwiGLU experts; imported at use, with QuACK.

QuACK traces the function below once per element and compiles it into the grouped product; it finds
it again, in another process, by the names of this module and of the function.
"""

from typing import Any

from quack.activation import swiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import ColVecLoad


@gemm_epilogue(outputs=("product",), ops={"gates": ColVecLoad("gates")}, mode="acc_pair")
def gated_swiglu(acc: Any, gates: Any) -> dict[str, Any]:
    """Computes silu(gate) * up * gates of a pair of neighbouring columns, and keeps the pair.

    Args:
        acc: gate and up, which are neighbours because QuACK interleaves the weight's halves.
        gates: the row's router weight, fp32.
    """
    gate, up = unpack(acc)
    return {"D": pack(gate, up), "product": swiglu(gate, up) * gates}
