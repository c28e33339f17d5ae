"""A model whose layers take kernels against the same model on torch's functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.experts import slots
from moe_ext.kernels import (
    cross_entropy,
    fused,
    gated_unit,
    rms_norm,
    rotated_norm,
    triton_jit,
)
from moe_ext.layers.transformer import transformer_config
from moe_ext.routers import fused_route

pytest.importorskip("triton", reason="triton has no wheel for this platform")

MODEL = MoEModelConfig(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=3,
    num_query_groups=3,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=7,
    moe_layer_freq=2,
    ffn_hidden_size=11,
    moe_shared_expert_intermediate_size=9,
    vocab_size=37,
    make_vocab_size_divisible_by=8,
    init_method_std=0.3,
)
LENGTH = 5


def counting(launched: dict[tuple[Any, str], int], key: tuple[Any, str]) -> Callable[..., Any]:
    function = getattr(*key)

    def noted(*args: Any, **others: Any) -> Any:
        launched[key] += 1
        return function(*args, **others)

    return noted


# Of input and feed-forward norms in both layers, and the final norm; of queries and keys; of a
# dense layer and a shared expert; of the head; of the router and the order of its experts' rows.
LAUNCHES: dict[tuple[Any, str], int] = {
    (rms_norm, "rms_norm"): 2 * 2 + 1,
    (rotated_norm, "rotated_norm"): 2 * 2,
    (gated_unit, "gated_unit"): 2,
    (cross_entropy, "softmax_statistics"): 1,
    (fused_route, "select"): 1,
    (slots, "count_and_sort"): 1,
}


@pytest.mark.skipif(not triton_jit.IS_INTERPRETED, reason="on a GPU tests/gpu compares")
def test_a_model_on_kernels_has_the_losses_and_gradients_of_one_on_torch(
    single_rank: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MODEL.problems() == []
    launched = dict.fromkeys(LAUNCHES, 0)
    for key in LAUNCHES:
        monkeypatch.setattr(*key, counting(launched, key))
    monkeypatch.setattr(fused, "takes", lambda setting, *_: setting == "auto")
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for setting in ("off", "auto"):
        assert not any(launched.values())
        config = transformer_config(MODEL, bf16=False)
        config.fused_kernels = setting
        built = build_model(MODEL, config, pg_collection=single_rank, seq_length=LENGTH, seed=3)
        chunk = built.chunks[0]
        tokens = torch.randint(37, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(LENGTH).expand(2, -1)
        mask = torch.ones(2, LENGTH)
        losses = chunk(tokens[:, :-1], positions, labels=tokens[:, 1:], loss_mask=mask)
        losses.sum().backward()
        gradients = {name: each.grad for name, each in chunk.named_parameters()}
        found.append((losses, gradients))
    assert launched == LAUNCHES
    (losses, expected), (actual, gradients) = found
    torch.testing.assert_close(actual, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        difference = torch.linalg.vector_norm(gradient - expected[name])
        assert difference <= 1e-5 * torch.linalg.vector_norm(expected[name]), name
