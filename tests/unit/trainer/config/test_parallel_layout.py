"""Tests the group sizes that parallel settings and a number of ranks resolve to."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.config.parallel_layout import Layout, num_microbatches, resolve_layout
from megatron.trainer.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Holds every group, like the config of an application."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)


SIZES = st.sampled_from([1, 2, 3, 4])


@given(
    tensor=SIZES,
    pipeline=SIZES,
    context=SIZES,
    expert=SIZES,
    expert_tensor=SIZES | st.none(),
    more=SIZES,
)
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_group_sizes_are_those_of_the_grid_of_ranks(
    tensor: int, pipeline: int, context: int, expert: int, expert_tensor: int | None, more: int
) -> None:
    world_size = 144 * pipeline * more  # a multiple of every product of two sizes
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    layout = resolve_layout(parallel, world_size)
    width = tensor if expert_tensor is None else expert_tensor
    ranks = np.arange(world_size)
    assert layout == Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_stages=1,
        context=context,
        expert=expert,
        expert_tensor=width,
        data=ranks.reshape(pipeline, -1, context, tensor).shape[1],
        expert_data=ranks.reshape(pipeline, -1, expert, width).shape[1],
        sequence_parallel=tensor > 1,
    )


@pytest.mark.parametrize(
    ("tensor", "requested", "resolved"),
    [(1, None, False), (2, None, True), (2, False, False), (2, True, True)],
)
def test_sequence_parallel_follows_the_tensor_parallel_size_unless_set(
    tensor: int, requested: bool | None, resolved: bool
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=requested)
    assert resolve_layout(parallel, 4).sequence_parallel is resolved


def test_an_impossible_layout_is_refused_with_every_reason() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=3)
    with pytest.raises(ConfigError) as caught:
        resolve_layout(parallel, 5)
    assert [line[:26] for line in str(caught.value).split("\n")] == [
        "the number of ranks (5) mu"
    ] * 2


@given(micro=SIZES, batch=st.integers(1, 60), data=SIZES, pipeline=SIZES, virtual=SIZES)
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_a_batch_is_accepted_only_in_whole_microbatches_and_the_remedy_is_legal(
    micro: int, batch: int, data: int, pipeline: int, virtual: int
) -> None:
    virtual = virtual if pipeline > 1 else 1
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pipeline, num_virtual_stages_per_pipeline_rank=virtual
    )
    training = TrainingConfig(micro_batch_size=micro, global_batch_size=batch)
    model = MoEModelConfig(num_layers=pipeline * virtual)
    cfg = PretrainConfig(parallel=parallel, training=training, model=model)
    world_size = data * pipeline

    def is_legal(size: int) -> bool:
        per_rank, rest = divmod(size, micro * data)
        return rest == 0 and (virtual == 1 or per_rank % pipeline == 0)

    if is_legal(batch):
        validate(cfg, world_size)
        layout = resolve_layout(parallel, world_size)
        assert num_microbatches(training, layout) * micro * layout.data == batch
        return
    with pytest.raises(ConfigError) as caught:
        validate(cfg, world_size)
    message = str(caught.value)
    assert message.startswith(f"global_batch_size ({batch})")
    named = [int(size) for size in re.findall(r"\d+", message.split("batch size of ")[1])]
    below = [size for size in range(1, batch) if is_legal(size)]
    above = next(size for size in range(batch, 10_000) if is_legal(size))
    assert named == [*below[-1:], above]


@pytest.mark.parametrize(
    ("parallel", "seq_length", "expected"),
    [
        (
            ParallelConfig(context_parallel_size=2),
            18,
            "seq_length (18) must be a multiple of 4, because context_parallel_size (2) gives each"
            " rank an early and a late chunk of every sequence; use a sequence length of 16 or 20",
        ),
        (
            ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=3),
            18,
            "seq_length (18) must be a multiple of 12, because context_parallel_size (2) gives each"
            " rank an early and a late chunk of every sequence, which sequence_parallel splits over"
            " 3 more ranks; use a sequence length of 12 or 24",
        ),
        (
            ParallelConfig(context_parallel_size=5),
            20,
            "the number of ranks (6) must be a multiple of tensor_model_parallel_size x"
            " pipeline_model_parallel_size x context_parallel_size (1 x 1 x 5 = 5); start 5 or 10"
            " ranks, or change these sizes",
        ),
    ],
)
def test_context_parallelism_that_does_not_divide_is_refused(
    parallel: ParallelConfig, seq_length: int, expected: str
) -> None:
    training = TrainingConfig(seq_length=seq_length, global_batch_size=6)
    model = MoEModelConfig(
        hidden_size=132,
        num_attention_heads=6,
        moe_ffn_hidden_size=66,
        make_vocab_size_divisible_by=96,
    )
    with pytest.raises(ConfigError) as caught:
        validate(PretrainConfig(parallel=parallel, training=training, model=model), 6)
    assert str(caught.value) == expected
