"""One rank of test_blocks_tp: builds blocks from given weights and saves what they computed.

Usage: torchrun ... blocks_worker.py DIRECTORY
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.trainer.runtime.cpu_backend import redirect_cuda
from moe_ext.attention import QKNormSelfAttention, SDPACoreAttention
from moe_ext.compat import without_cuda_graphs
from moe_ext.experts import ExpertMLP, look_up_backend
from moe_ext.experts.layer import ExpertsLayer
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import SoftmaxTopKRouter


def make_config(**changes: object) -> TransformerConfig:
    fields = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 3,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 6,
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        **without_cuda_graphs(),
    }
    return TransformerConfig(**{**fields, **changes})


def initialize(tp: int, *, ep: int = 1, etp: int = 1) -> ProcessGroupCollection:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def qk_norm(inputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's heads of q, k and v, and all gradients, with sequences split over the ranks."""
    groups = initialize(world_size)
    config = make_config(
        params_dtype=torch.float64, tensor_model_parallel_size=world_size, sequence_parallel=True
    )
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SDPACoreAttention,
        linear_proj=RowParallelLinear,
    )
    attention = QKNormSelfAttention(config, submodules, layer_number=1, pg_collection=groups)

    def mine(name: str, dim: int) -> Tensor:
        return inputs[name].chunk(world_size, dim=dim)[rank].clone()

    weights = {
        "qkv": attention.linear_qkv.weight,
        "q_norm": attention.q_norm.weight,
        "k_norm": attention.k_norm.weight,
    }
    for name, weight in weights.items():
        weight.data.copy_(mine(name, 0))
    hidden = mine("hidden", 0).requires_grad_()
    tensors = dict(zip("qkv", attention.get_query_key_value_tensors(hidden), strict=True))
    losses = [(tensor * mine(f"upstream_{n}", 2)).sum() for n, tensor in tensors.items()]
    torch.stack(losses).sum().backward()
    shard = attention.sharded_state_dict("")["q_norm.weight"]
    return {
        **{name: tensor.detach() for name, tensor in tensors.items()},
        **{f"grad_{name}": weight.grad for name, weight in weights.items()},
        "grad_hidden": hidden.grad,
        "shard": torch.tensor([*shard.global_shape, *shard.global_offset]),
    }


def router(inputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's probs, gradients and the report, with tokens split over the ranks."""
    groups = initialize(world_size)
    metrics = RouterMetrics(2, 4)
    config = make_config(
        params_dtype=torch.float64, tensor_model_parallel_size=world_size, sequence_parallel=True
    )
    gate = SoftmaxTopKRouter(
        config, groups, aux_loss_coeff=0.3, z_loss_coeff=0.07, router_dtype=None, metrics=metrics
    )
    gate.set_layer_number(1)
    gate.weight.data.copy_(inputs["gate"])
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25, dtype=torch.float64))
    hidden = inputs["hidden"].chunk(world_size)[rank].clone().requires_grad_()
    routing = gate(hidden)
    probs = torch.zeros_like(routing.scores).scatter(1, routing.experts, routing.gates)  # [t, e]
    (probs * inputs["upstream_probs"].chunk(world_size)[rank]).sum().backward()
    report = metrics.reduce()
    assert gate.weight.grad is not None and hidden.grad is not None
    return {
        "probs": probs.detach(),
        "grad_gate": gate.weight.grad,
        "grad_hidden": hidden.grad,
        "losses": torch.tensor([report.load_balancing_loss, report.z_loss]),
        "load": report.load[0],
    }


def moe_layer(inputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Expert gradients after reduction, and the gradient norm, under every layout of two ranks."""
    results: dict[str, Tensor] = {}
    for tp, ep, etp in ((2, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 1), (1, 1, 1)):
        for distributed_optimizer in (False, True):
            groups = initialize(tp, ep=ep, etp=etp)
            config = make_config(
                tensor_model_parallel_size=tp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                sequence_parallel=tp > 1,
            )
            key = f"tp{tp} ep{ep} etp{etp} {'sharded' if distributed_optimizer else 'plain'}"
            layer = build_moe_layer(config, groups, inputs)
            parts = expert_gradients(
                layer, config, groups, inputs, distributed_optimizer=distributed_optimizer
            )
            results.update({f"{key} {name}": tensor for name, tensor in parts.items()})
    return results


def build_moe_layer(
    config: TransformerConfig, groups: ProcessGroupCollection, inputs: dict[str, Tensor]
) -> ExpertsLayer:
    gate = partial(
        SoftmaxTopKRouter,
        aux_loss_coeff=0.0,
        z_loss_coeff=0.0,
        router_dtype=None,
        metrics=RouterMetrics(1, 4),
    )
    experts = ModuleSpec(module=ExpertMLP, params={"backend": look_up_backend("grouped")})
    layer = ExpertsLayer(config, MoESubmodules(experts=experts, router=gate), pg_collection=groups)
    layer.set_layer_number(1)
    layer.router.weight.data.copy_(inputs["gate"])
    for name, shard in layer.experts.sharded_state_dict("").items():
        getattr(layer.experts, name).data.copy_(inputs[name][shard.global_slice()])
    return layer


def expert_gradients(
    layer: ExpertsLayer,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    inputs: dict[str, Tensor],
    *,
    distributed_optimizer: bool,
) -> dict[str, Tensor]:
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    model = DistributedDataParallel(config, ddp_config, layer)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1.0, use_distributed_optimizer=distributed_optimizer), [model]
    )
    model.zero_grad_buffer()
    # Tensor parallel ranks share a sequence; data parallel ranks have a sample each.
    split = groups.tp if groups.tp.size() > 1 else groups.dp
    dim = 0 if groups.tp.size() > 1 else 1

    def mine(name: str) -> Tensor:
        return inputs[name].float().chunk(split.size(), dim=dim)[split.rank()].contiguous()

    output, _ = model(mine("hidden"))
    # Gradients are averaged over data parallel ranks; this makes the average the sum.
    ((output * mine("upstream")).sum() * groups.dp.size()).backward()
    finalize_model_grads([model])
    optimizer.prepare_grads()
    results = {"norm": torch.tensor(optimizer.get_grad_norm())}
    if not distributed_optimizer:
        for name, shard in layer.experts.sharded_state_dict("").items():
            window = torch.zeros(shard.global_shape)
            window[shard.global_slice()] = getattr(layer.experts, name).main_grad
            results[name] = window
    return results


CASES: dict[str, Callable[[dict[str, Tensor], int, int], dict[str, Tensor]]] = {
    "qk_norm": qk_norm,
    "router": router,
    "moe_layer": moe_layer,
}


def main(directory: Path) -> None:
    redirect_cuda()
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    inputs = torch.load(directory / "inputs.pt", weights_only=True)
    results = {name: case(inputs[name], rank, world_size) for name, case in CASES.items()}
    torch.save(results, directory / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
