"""One of two ranks of test_host_collectives: writes down what every collective returned.

Usage: torchrun ... host_worker.py OUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron.trainer.runtime.cpu_backend import redirect_cuda

SENT = [[1, 3], [4, 0]]
"""Rows that rank r sends to rank q."""
SIZES = [2, 5]
"""Rows that rank r holds of a gathered tensor."""


def rows(count: int, rank: int) -> Tensor:
    """[count, 2] numbers that no other row of any rank has."""
    return (torch.arange(count * 2.0).view(count, 2) + 100 * rank).requires_grad_()


def weights_like(tensor: Tensor, rank: int) -> Tensor:
    """The gradient that this rank sends back: another number for every element."""
    return torch.arange(1.0, tensor.numel() + 1).view_as(tensor) + 1000 * rank


def forward_and_backward(compute: Callable[[Tensor], Tensor], given: Tensor) -> dict[str, Any]:
    result = compute(given)
    result.backward(weights_like(result, dist.get_rank()))
    assert given.grad is not None
    return {"value": result.tolist(), "gradient": given.grad.tolist()}


def all_to_all(as_sizes: Callable[[list[int]], Any], module: Any) -> dict[str, Any]:
    rank = dist.get_rank()
    sent, received = SENT[rank], [row[rank] for row in SENT]
    return forward_and_backward(
        lambda x: module.all_to_all(dist.group.WORLD, x, as_sizes(received), as_sizes(sent)),
        rows(sum(sent), rank),
    )


def gather(sizes: Any, count: int) -> dict[str, Any]:
    """Every rank uses all rows differently, so a row's gradient is a sum over ranks."""
    return forward_and_backward(
        lambda x: mappings.gather_from_sequence_parallel_region(
            x, group=dist.group.WORLD, output_split_sizes=sizes
        ),
        rows(count, dist.get_rank()),
    )


def reduce_scatter(sizes: Any, count: int) -> dict[str, Any]:
    return forward_and_backward(
        lambda x: mappings.reduce_scatter_to_sequence_parallel_region(
            x, group=dist.group.WORLD, input_split_sizes=sizes
        ),
        rows(count, dist.get_rank()),
    )


def main() -> None:
    dist.init_process_group("gloo")
    redirect_cuda()
    rank = dist.get_rank()
    answers = {
        "all_to_all lists": all_to_all(list, mappings),
        "all_to_all tensors": all_to_all(torch.tensor, mappings),
        "all_to_all numpy": all_to_all(np.array, mappings),
        "all_to_all dispatcher": all_to_all(torch.tensor, token_dispatcher),
        "gather uneven": gather(SIZES, SIZES[rank]),
        "gather uneven tensor": gather(torch.tensor(SIZES), SIZES[rank]),
        "gather empty": gather([0, 3], [0, 3][rank]),
        "gather even": gather(None, 3),
        "reduce_scatter uneven": reduce_scatter(SIZES, sum(SIZES)),
        "reduce_scatter empty": reduce_scatter([0, 3], 3),
        "reduce_scatter even": reduce_scatter(None, 6),
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
