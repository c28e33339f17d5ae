"""Tests reading batches ahead into pinned memory, and copying them to a GPU without blocking."""

import numpy as np
import pytest
import torch

from megatron.trainer.data.read_ahead import Loading
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import MockSource
from megatron.trainer.data.stream import SampleStream

pytestmark = pytest.mark.gpu

SIZES = {
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
}


def stream(loading: Loading) -> SampleStream:
    source = MockSource(vocab_size=1000, seq_length=512, seed=1)
    phases = [Phase(sources=(source.name,), weights=(1.0,))]
    return SampleStream([source], phases, seq_length=512, seed=1, loading=loading)


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_batches_on_the_gpu_equal_those_in_pageable_memory(num_ahead: int) -> None:
    """Reuses pinned memory; no buffer may be overwritten before its copy has finished."""
    gpu = torch.device("cuda", 0)
    plain, pinned = stream(Loading()), stream(Loading(num_ahead=num_ahead, gpu=gpu))
    found = []
    for _ in range(20):
        batches = pinned.next_global_batch(**SIZES)
        assert all(batch.tokens.is_pinned() and batch.loss_mask.is_pinned() for batch in batches)
        found.append([batch.to(gpu) for batch in batches])
    for step in found:
        for one, other in zip(step, plain.next_global_batch(**SIZES), strict=True):
            assert one.tokens.device.type == "cuda"
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                found_values = getattr(one, name).cpu().numpy()
                assert np.array_equal(found_values, getattr(other, name).numpy()), name
    pinned.stop_reading()
