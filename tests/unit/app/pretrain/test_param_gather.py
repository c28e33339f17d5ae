"""Weights that arrive only when a hook waits for them, one by one, are there whenever one is read.

Until a module waits for a weight it is NaN, which no loss survives.
"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.optim.param_gather import wait_before_forward
from moe_app.pretrain.config import PretrainConfig
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.layers.lora import TARGETS, LoRA
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_experts": 5,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 8,
    "vocab_size": 37,
}
JETMOE = {**PRESETS["jetmoe_tiny"], **SMALL, "num_attention_heads": 6, "kv_channels": 4}
JETMOE["num_query_groups"] = 3
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": SMALL,
    "loop": {**SMALL, "expert_backend": "loop"},
    "tied": {**SMALL, "untie_embeddings_and_output_weights": False},
    "shared_expert": {**SMALL, "moe_shared_expert_intermediate_size": 9},
    "shared_by_layers": {**SMALL, "moe_share_across_layers": True},
    "every_second": {**SMALL, "moe_layer_freq": 2, "ffn_hidden_size": 11},
    "expert_choice": {**SMALL, "router": "expert_choice"},
    "dense": {**SMALL, "num_experts": None, "ffn_hidden_size": 20},
    "jetmoe": JETMOE,
    "lora": SMALL,
}


class Late:
    """Stands for a bucket of one weight whose gather has not ended."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.value = weight, weight.detach().clone()
        weight.data.fill_(torch.nan)

    def finish_param_sync(self, *, skip_next_bucket_dispatch: bool) -> None:
        assert skip_next_bucket_dispatch
        self.weight.data.copy_(self.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["losses", "logits"])
def test_every_weight_is_waited_for_before_it_is_read(
    name: str, what: str, single_rank: ProcessGroupCollection
) -> None:
    model = MoEModelConfig(**MODELS[name])
    lora = LoRA(rank=2, alpha=4.0, targets=TARGETS) if name == "lora" else None
    config = transformer_config(model, bf16=False)
    built = build_model(model, config, pg_collection=single_rank, seq_length=6, seed=3, lora=lora)
    (chunk,) = built.chunks
    tokens = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1) if what == "losses" else None
    positions = torch.arange(6)[None]
    with torch.no_grad():
        truth = chunk(tokens, positions, labels=labels)
    late = {weight: Late(weight) for weight in chunk.parameters()}
    wrapped = SimpleNamespace(
        module=chunk,
        param_to_bucket_group=late,
        ddp_config=SimpleNamespace(align_param_gather=True),
    )
    wait_before_forward(cast(DistributedDataParallel, wrapped))
    with torch.no_grad():
        assert torch.equal(chunk(tokens, positions, labels=labels), truth)
    assert truth.isfinite().any()
    for key, weight in chunk.named_parameters():
        assert not weight.isnan().any(), key


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("use_distributed_optimizer", "every rank updates all weights otherwise"),
        (
            "overlap_grad_reduce",
            "weights are gathered in the buckets that gradients are reduced in",
        ),
    ],
)
def test_what_it_needs_is_named_with_a_remedy(missing: str, why: str) -> None:
    needed: dict[str, Any] = {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        missing: False,
    }
    cfg = PretrainConfig(parallel=ParallelConfig(overlap_param_gather=True, **needed))
    with pytest.raises(ConfigError) as caught:
        validate(cfg, 2)
    flag = missing.replace("_", "-")
    assert str(caught.value) == (
        f"overlap_param_gather (True) needs {missing} (False), because {why}; set --{flag}, or drop"
        " --overlap-param-gather"
    )
