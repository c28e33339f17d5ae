"""Check that repeating sequences leave the loss but not its denominator."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.batch import Batch, mask_rows
from megatron.trainer.data.build import build_data
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.state import TrainState
from megatron.trainer.step import _place

LENGTH = 64
REPEATING = {1, 3}
"""Windows in which a token repeats 32 times; in window 2 it does so 31 times, and once beyond."""


def read_rows(tmp_path: Path, *, mask: bool) -> dict[int, Batch]:
    """Read every window of a file as a batch of one, by number."""
    tokens = np.tile(np.arange(LENGTH), 5) % 50
    for window, (first, count) in {1: (5, 32), 2: (LENGTH - 31, 32), 3: (0, 40)}.items():
        tokens[window * LENGTH + first : window * LENGTH + first + count] = 60
    tokens[3 * LENGTH] = 60
    prefix = str(tmp_path / "corpus")
    with TokenFileWriter(prefix, vocab_size=100) as writer:
        writer.add_document(np.append(tokens, 1).astype(np.uint16))
        writer.finish()
    cfg = DataConfig(data_path=(prefix,), mask_repetitions=mask)
    data = build_data(cfg, vocab_size=100, seq_length=LENGTH, seed=1)
    (source,) = data.train.sources
    order = source.windows_of(np.arange(5)).tolist()
    sizes = {"global_batch_size": 5, "micro_batch_size": 1}
    batches = data.train.next_global_batch(**sizes, data_parallel_rank=0, data_parallel_size=1)
    return dict(zip(order, batches, strict=True))


def test_rows_that_repeat_have_no_label_that_counts(tmp_path: Path) -> None:
    for window, batch in read_rows(tmp_path, mask=True).items():
        wanted = 0.0 if window in REPEATING else 1.0
        assert batch.loss_mask.unique().tolist() == [wanted], window
        assert batch.loss_tokens is not None and batch.loss_tokens.item() == LENGTH
    plain = read_rows(tmp_path, mask=False)
    assert all(batch.loss_mask.all() and batch.loss_tokens is None for batch in plain.values())


@pytest.mark.parametrize("masked", [[], [0], [0, 1]])
def test_denominator_is_that_of_all_positions(
    masked: list[int], make_state: Callable[..., TrainState]
) -> None:
    state = make_state()
    batches = state.train_data.next_global_batch(
        global_batch_size=8, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    positions = batches[0].tokens.numel()
    first = mask_rows(batches[0], [row in masked for row in range(2)])
    for batch in _place(state, NEXT_TOKEN, [first, *batches[1:]]):
        assert batch.loss_tokens is not None and batch.loss_tokens.item() == positions
    dropped = first.loss_mask.numel() - int(first.loss_mask.sum())
    assert dropped == len(masked) * positions // 2
    # A mask without the count divides by what is left, as it did before.
    left = torch.stack([batch.loss_mask.sum() for batch in batches]).mean().item()
    for batch in _place(state, NEXT_TOKEN, batches):
        assert batch.loss_tokens is not None and batch.loss_tokens.item() == left
