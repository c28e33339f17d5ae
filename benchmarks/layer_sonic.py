"""Implements SonicMoE's layer of experts under a given routing; needs a Hopper GPU and bf16.

`sonic-moe` 0.1.2 pins an older torch, so it is installed with --no-deps, beside `quack-kernels` and
`nvidia-cutlass-dsl`. Its packages are imported when the layer is built.
"""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer_problem import LayerProblem, LayerSubject, grad_of
from benchmarks.shapes import Shape

# tile_m, tile_n, pingpong: each compiles for seconds, and all of QuACK's would for minutes.
TUNED = {
    (256, 128, False),
    (128, 256, False),
    (256, 192, False),
    (128, 192, True),
    (128, 128, True),
}
_HOPPER = 9


class SonicLayer(LayerSubject):
    """Runs SonicMoE's experts; the order of the rows is made in each forward pass, as it does.

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        limit_tuning()
        super().__init__(problem)
        weight1, weight2 = problem.expert_weights()
        self._weight1, self._weight2 = nn.Parameter(weight1), nn.Parameter(weight2)
        self._gates = torch.empty_like(problem.routing.gates)
        self.take_routing()
        self._gates.requires_grad_()

    def take_routing(self) -> None:
        """See `LayerSubject`."""
        routing = self.problem.routing
        self._gates.copy_(routing.gates)
        self._chosen = routing.experts.int().contiguous()

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        rows = self.hidden.flatten(0, 1)  # [t, h]
        weight1, weight2 = (each.permute(1, 2, 0) for each in (self._weight1, self._weight2))
        return experts(rows, self._gates, self._chosen, weight1, weight2).view_as(self.hidden)

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters and gates."""
        yield from (self._weight1, self._weight2, self._gates)

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        return {
            "gates": grad_of(self._gates),
            "weight1": grad_of(self._weight1),
            "weight2": grad_of(self._weight2),
        }


def experts(x: Tensor, gates: Tensor, chosen: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """Call what `sonicmoe.functional.moe_TC_softmax_topk_layer` calls after its router.

    Args:
        x: [t, h].
        gates: [t, k] fp32.
        chosen: [t, k] int32.
        weight1: [2f, h, e], gate rows first.
        weight2: [h, f, e].
    """
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]
    from sonicmoe.functional import (  # type: ignore[import-not-found]
        TC_topk_router_metadata_triton,
        _DownProjection,
        _UpProjection,
    )

    (tokens, topk), number = chosen.shape, weight2.size(-1)
    rows, activation = tokens * topk, ActivationType.SWIGLU
    counts, offsets, gather, scatter, back = (
        torch.empty(size, dtype=torch.int32, device=x.device)
        for size in (number, number + 1, rows, rows, rows)
    )
    TC_topk_router_metadata_triton(chosen, number, counts, offsets, gather, scatter, back)
    # None: biases, and offsets of tokens whose number of experts varies, which False rules out.
    active, hidden = _UpProjection.apply(
        x, weight1, None, offsets, rows, topk, gather, scatter, back, None, False, activation,
        False, True,  # not inference; gate rows first, not in turns
    )  # fmt: skip
    output: Tensor = _DownProjection.apply(
        active, hidden, weight2, None, gates, offsets, tokens, topk, gather, scatter, back, None,
        False, activation,
    )  # fmt: skip
    return output


def limit_tuning() -> None:
    """Let QuACK's products choose among a few configurations for Hopper.

    Its tuners list them when they are imported, and those of epilogues when they are made.

    Raises:
        RuntimeError: they are imported already.
    """
    if "quack.gemm_interface" in sys.modules:
        raise RuntimeError("QuACK's products are imported already; limit their tuning before")
    from quack import gemm_config

    list_all = gemm_config.get_all_configs

    @functools.wraps(list_all)
    def list_few(*args: Any, **options: Any) -> list[Any]:
        configs: list[Any] = list_all(*args, **options)
        return [each for each in configs if _is_tried(each)] or configs

    gemm_config.get_all_configs = list_few


def _is_tried(config: Any) -> bool:
    is_plain = not config.swap_ab and config.cluster_n == 1
    tile = (config.tile_m, config.tile_n, config.pingpong)
    return config.device_capacity == _HOPPER and tile in TUNED and is_plain


def build(device: torch.device, shape: Shape, routing: str, dtype: torch.dtype) -> LayerSubject:
    """Build the layer in a worker."""
    return SonicLayer(LayerProblem(shape, routing, device, dtype))
