"""Compare the formula of kept activations with what autograd saves."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from benchmarks.held import orders, storages
from megatron.trainer.config.parallel_layout import resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.cost.activations import Step, StepRank, micro_batch
from moe_ext.cost.memory import expert_activation_bytes
from moe_ext.experts import EXPERT_BACKENDS
from moe_ext.experts.grouped_gemm import grouped_gemm_routed_experts
from moe_ext.experts.interface import RoutedExpertFunction
from moe_ext.experts.slots import sort_by_expert
from moe_ext.kernels import fused, triton_jit
from moe_ext.layers.transformer import transformer_config

TOKENS = 24


@pytest.mark.parametrize("backend", ["grouped", "grouped_gemm", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_keep_the_bytes_of_the_formula(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton has no wheel for this platform")
    if backend == "grouped_gemm" and dtype != torch.bfloat16:
        pytest.skip("the grouped GEMM multiplies bf16")
    model = MoEModelConfig(hidden_size=16, num_experts=5, moe_router_topk=2, moe_ffn_hidden_size=8)
    tokens = torch.randn(TOKENS, 16, dtype=dtype).requires_grad_()
    weight1 = torch.randn(5, 2, 8, 16, dtype=dtype).requires_grad_()
    weight2 = torch.randn(5, 16, 8, dtype=dtype).requires_grad_()
    gates = torch.rand(TOKENS, 2).requires_grad_()
    order = sort_by_expert(torch.rand(TOKENS, 5).topk(2).indices, num_experts=5)
    weights = {weight.untyped_storage().data_ptr() for weight in (weight1, weight2)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routed: RoutedExpertFunction = grouped_gemm_routed_experts
        if backend != "grouped_gemm":
            routed = EXPERT_BACKENDS[backend].routed_experts
        output = routed(tokens, weight1, weight2, order, gates)
    assert output.requires_grad
    orders = (order.rows, order.places, order.tokens)
    found = sum(kept.values()) + sum(index.nbytes for index in orders)
    expected = expert_activation_bytes(model, element_bytes=tokens.element_size())
    assert found == TOKENS * expected


MODEL = MoEModelConfig(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=3,
    num_query_groups=3,
    num_experts=5,
    moe_router_topk=2,
    moe_ffn_hidden_size=7,
    moe_shared_expert_intermediate_size=9,
    vocab_size=40,
    make_vocab_size_divisible_by=8,
)
LENGTH, BATCH = 6, 2


class Held:
    """Wraps a tensor that autograd saves; it is freed when autograd releases it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.skipif(not triton_jit.IS_INTERPRETED, reason="counts on a CPU")
@pytest.mark.parametrize("moa", [{}, {"attention": "moa", "num_attention_heads": 6}], ids=str)
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_micro_batch_keeps_the_bytes_of_the_formula_with_and_without_kernels(
    single_rank: ProcessGroupCollection,
    monkeypatch: pytest.MonkeyPatch,
    is_fused: bool,
    moa: dict[str, Any],
) -> None:
    monkeypatch.setattr(fused, "takes", lambda *_: is_fused)
    model = dataclasses.replace(MODEL, **moa)
    config = transformer_config(model, bf16=False)
    built = build_model(model, config, pg_collection=single_rank, seq_length=LENGTH, seed=3)
    (chunk,) = built.chunks
    tokens = torch.randint(37, (BATCH, LENGTH + 1))
    positions, mask = torch.arange(LENGTH).expand(BATCH, -1), torch.ones(BATCH, LENGTH)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    given = storages([*chunk.parameters(), inputs, labels, positions, mask])
    saved: list[weakref.ref[Held]] = []
    earlier = {id(order) for order in orders()}

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        losses = chunk(inputs, positions, labels=labels, loss_mask=mask)
    assert losses.requires_grad
    tensors = [held.tensor for each in saved if (held := each()) is not None]
    for order in orders():  # which backward passes hold without autograd's hooks seeing them
        if id(order) not in earlier:
            tensors += filter(torch.is_tensor, vars(order).values())
    found = sum(size for place, size in storages(tensors).items() if place not in given)
    layout = resolve_layout(ParallelConfig(), 1)
    step = Step(
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        num_microbatches=1,
        bf16=False,
        device_type="cpu",
        has_positions=True,
        fused_kernels=is_fused,
    )
    rank = StepRank(model=model, layout=layout, batch=step, stage=0)
    assert found == pytest.approx(micro_batch(rank, rank.chunks[0]), abs=4 * model.num_layers)


def test_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="dense"):
        expert_activation_bytes(
            MoEModelConfig(num_experts=None, ffn_hidden_size=8), element_bytes=2
        )
