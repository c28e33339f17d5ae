"""Compare the formula of kept activations with what autograd saves."""

import pytest
import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.cost.memory import expert_activation_bytes
from moe_ext.experts import EXPERT_BACKENDS
from moe_ext.experts.grouped_gemm import grouped_gemm_routed_experts
from moe_ext.experts.interface import RoutedExpertFunction
from moe_ext.experts.slots import sort_by_expert

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


def test_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="dense"):
        expert_activation_bytes(
            MoEModelConfig(num_experts=None, ffn_hidden_size=8), element_bytes=2
        )
