"""One rank of test_blocks_moa: builds an attention from given weights and saves what it computed.

Usage: torchrun --nproc-per-node 2 blocks_moa_worker.py DIRECTORY
"""

import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron.trainer.runtime.cpu_backend import redirect_cuda
from megatron.trainer.runtime.launch import environment_rank
from moe_ext.attention import MoASelfAttention, MoASubmodules, SDPACoreAttention
from moe_ext.experts import look_up_backend
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import TopKSoftmaxRouter
from tests.distributed.blocks_worker import initialize, make_config

EXPERTS, TOPK = 5, 3
CASES = {"whole": (1, False), "sequence_parallel": (2, True), "tensor_parallel": (2, False)}
"""Tensor parallel size and sequence parallelism."""


def build(inputs: dict[str, Tensor], tp: int, *, sequence_parallel: bool) -> MoASelfAttention:
    groups = initialize(tp)
    config = make_config(
        num_query_groups=2,
        num_attention_heads=2 * TOPK,
        kv_channels=4,
        params_dtype=torch.float64,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
    )
    router = partial(
        TopKSoftmaxRouter,
        aux_loss_coeff=0.3,
        z_loss_coeff=0.07,
        router_dtype=None,
        metrics=RouterMetrics(1, EXPERTS),
        num_experts=EXPERTS,
        topk=TOPK,
    )
    attention = MoASelfAttention(
        config,
        MoASubmodules(router=router, core_attention=SDPACoreAttention),
        layer_number=1,
        pg_collection=groups,
        num_experts=EXPERTS,
        topk=TOPK,
        backend=look_up_backend("grouped"),
    )
    for name, shard in attention.sharded_state_dict("").items():
        attention.get_parameter(name).data.copy_(inputs[name][shard.global_slice()])
    return attention


def run(inputs: dict[str, Tensor], tp: int, *, sequence_parallel: bool) -> dict[str, Tensor]:
    """Output and gradients, each in its place in a tensor of the whole's shape."""
    attention = build(inputs, tp, sequence_parallel=sequence_parallel)
    group = attention.tp_group
    parts = group.size() if sequence_parallel else 1
    part = group.rank() if sequence_parallel else 0

    def mine(name: str) -> Tensor:
        return inputs[name].chunk(parts)[part].clone()

    hidden = mine("hidden").requires_grad_()
    output, _ = attention(hidden, None, rotary_pos_emb=inputs["angles"])
    (output * mine("upstream")).sum().backward()
    report = attention.router.metrics.reduce()
    results = {
        "output": output.detach(),
        "grad hidden": hidden.grad,
        "losses": torch.tensor([report.load_balancing_loss, report.z_loss]),
        "load": report.load,
    }
    for name, shard in attention.sharded_state_dict("").items():
        weight = attention.get_parameter(name)
        gradient = weight.grad.clone()
        if getattr(weight, "sequence_parallel", False):  # what megatron-core does after backward
            torch.distributed.all_reduce(gradient, group=group)
        window = torch.zeros(shard.global_shape, dtype=gradient.dtype)
        window[shard.global_slice()] = gradient
        results[f"grad {name}"] = window
    with torch.no_grad():
        single, _ = attention.eval()(
            inputs["hidden"][:1], None, rotary_pos_emb=inputs["angles"][:1]
        )
    if not sequence_parallel:
        results["one token"] = single
    return results


def main(directory: Path) -> None:
    redirect_cuda()
    torch.distributed.init_process_group("gloo")
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25, dtype=torch.float64))
    inputs = torch.load(directory / "inputs.pt", weights_only=True)
    results = {
        name: run(inputs, tp, sequence_parallel=sequence_parallel)
        for name, (tp, sequence_parallel) in CASES.items()
    }
    torch.save(results, directory / f"rank{environment_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
