"""The flexible dispatcher is refused where DeepEP cannot send; what it computes: test_parity.py."""

from typing import Any

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.layers.transformer import transformer_config

MODEL = MoEModelConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=4,
    vocab_size=16,
    moe_token_dispatcher_type="flex",
)


def build(groups: ProcessGroupCollection) -> None:
    config = transformer_config(MODEL, bf16=False)
    build_model(MODEL, config, pg_collection=groups, seq_length=4, seed=None)


def test_without_its_package_the_error_names_it(
    single_rank: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_dispatcher, "fused_dispatch", None)  # where there is one
    with pytest.raises(ValueError, match=r"'flex', which needs the package deep_ep.*use alltoall"):
        build(single_rank)


def test_on_a_cpu_it_is_refused(
    single_rank: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    monkeypatch.setattr(token_dispatcher, "fused_dispatch", lambda: None)
    with pytest.raises(ValueError, match=r"kernels send between GPUs, but the device is 'cpu'"):
        build(single_rank)


def test_experts_that_are_all_on_one_rank_need_another_dispatcher() -> None:
    layout: dict[str, Any] = {
        **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "virtual_stages": 1},
        **{"sequence_parallel": True, "seq_length": 8},
    }
    (problem,) = MODEL.layout_problems(
        **layout, expert_model_parallel_size=1, expert_tensor_parallel_size=1
    )
    assert problem == (
        "moe_token_dispatcher_type (flex) needs expert_model_parallel_size (1) or"
        " expert_tensor_parallel_size (1) above 1, because it has nothing to send where a rank"
        " holds all experts; use alltoall, or more ranks for the experts"
    )
    for sizes in ((2, 1), (1, 2)):
        assert not MODEL.layout_problems(
            **layout, expert_model_parallel_size=sizes[0], expert_tensor_parallel_size=sizes[1]
        )
