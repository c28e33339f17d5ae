"""Mixture of attention heads as a module: marks, initial weights, shards, what it refuses."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_ext.attention import MoASelfAttention, MoASubmodules, SDPACoreAttention
from moe_ext.experts import look_up_backend
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import TopKSoftmaxRouter

ConfigMaker = Callable[..., TransformerConfig]
AttentionMaker = Callable[..., MoASelfAttention]

WIDTH, GROUPS, HEAD_SIZE, EXPERTS = 14, 3, 6, 5
HEADS_WIDTH = GROUPS * HEAD_SIZE  # not WIDTH


@pytest.fixture
def build(single_rank: ProcessGroupCollection, make_config: ConfigMaker) -> AttentionMaker:
    """Builds an attention as it comes."""

    def attention(*, topk: int = 2, backend: str = "grouped", **changes: Any) -> MoASelfAttention:
        fields = {
            "hidden_size": WIDTH,
            "num_query_groups": GROUPS,
            "num_attention_heads": GROUPS * topk,
            "kv_channels": HEAD_SIZE,
        }
        size: dict[str, Any] = {"num_experts": EXPERTS, "topk": topk}
        router = functools.partial(
            TopKSoftmaxRouter,
            aux_loss_coeff=0.0,
            z_loss_coeff=0.0,
            router_dtype=None,
            metrics=RouterMetrics(1, EXPERTS),
            **size,
        )
        return MoASelfAttention(
            make_config(**{**fields, **changes}),
            MoASubmodules(router=router, core_attention=SDPACoreAttention),
            layer_number=1,
            pg_collection=single_rank,
            backend=look_up_backend(backend),
            **size,
        )

    return attention


def test_weights_are_marked_for_megatron_core(build: AttentionMaker) -> None:
    attention = build()
    experts = attention.experts
    marked: dict[Any, int] = {
        attention.linear_kv.weight: 0,
        experts.weight_q: 1,
        experts.weight_o: 2,
    }
    for weight, axis in marked.items():
        assert weight.tensor_model_parallel is True and weight.partition_dim == axis
        assert getattr(weight, "allreduce", True)  # replicated over expert parallel ranks
    for whole in (attention.router.weight, attention.output_bias):
        assert not getattr(whole, "tensor_model_parallel", False)
        assert getattr(whole, "sequence_parallel", None) is False


def test_a_new_attention_has_no_bias_and_the_stated_initial_weights(build: AttentionMaker) -> None:
    attention = build(hidden_size=64, num_query_groups=4, num_attention_heads=8, kv_channels=16)
    assert not attention.output_bias.any()
    # Three standard errors of 8,192 and of 20,480 draws; megatron-core scales output layers.
    assert attention.linear_kv.weight.std().item() == pytest.approx(0.02, rel=0.025)
    assert attention.experts.weight_q.std().item() == pytest.approx(0.02, rel=0.015)
    assert attention.experts.weight_o.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.015)


class Rank:
    """A process group as far as a layout is concerned."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_the_shards_of_all_ranks_tile_the_agreed_checkpoint_once(
    single_rank: ProcessGroupCollection, build: AttentionMaker
) -> None:
    shapes = {
        "router.weight": (EXPERTS, WIDTH),
        "linear_kv.weight": (2 * HEADS_WIDTH, WIDTH),
        "experts.weight_q": (EXPERTS, HEADS_WIDTH, WIDTH),
        "experts.weight_o": (EXPERTS, WIDTH, HEADS_WIDTH),
        "output_bias": (WIDTH,),
    }
    tiles = {name: torch.zeros(4, *shape) for name, shape in shapes.items()}
    for tp in range(3):
        single_rank.tp = Rank(tp, 3)
        attention = build(tensor_model_parallel_size=3)
        shards = attention.sharded_state_dict("layers.self_attention.", ((0, 1, 4),))
        assert shards.keys() == {f"layers.self_attention.{name}" for name in shapes}
        for name, tile in tiles.items():
            shard = shards[f"layers.self_attention.{name}"]
            assert shard.data is attention.get_parameter(name)
            assert shard.global_shape == tuple(tile.shape), name
            if shard.replica_id == (0, 0, 0):
                tile[shard.global_slice()] += 1
    for name, tile in tiles.items():
        assert torch.equal(tile[1], torch.ones_like(tile[1])), name
        assert not tile[[0, 2, 3]].any()


def test_heads_that_do_not_fit_the_experts_are_refused(build: AttentionMaker) -> None:
    message = (
        "num_attention_heads (9) must be num_query_groups x experts per token (3 x 2); use"
        " num_attention_heads 6"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build(num_attention_heads=9, topk=2)


def test_heads_that_do_not_divide_are_refused(
    single_rank: ProcessGroupCollection, build: AttentionMaker
) -> None:
    single_rank.tp = Rank(0, 2)
    message = (
        "num_query_groups (3) must be a multiple of the tensor parallel size (2), which splits moa"
        " attention by head"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_what_belongs_to_other_attentions_is_refused(build: AttentionMaker) -> None:
    message = "key_value_states is 1, but moa attention needs None"
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(torch.zeros(2, 1, WIDTH), None, key_value_states=1)
