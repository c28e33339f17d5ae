"""What is kept of a forward pass: the likeliest tokens, and each window's routing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron.trainer.config.parallel_layout import resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.inference import parallel_model
from megatron.trainer.inference.parallel_model import ParallelModel
from megatron.trainer.runtime.launch import RunContext
from moe_app.analyze.capture import RouterPart, RoutingCapture, run_windows
from moe_app.analyze.texts import Window
from moe_ext.functional import softmax_topk

VOCAB, PADDED = 7, 10


class Head(nn.Module):
    """Returns logits of hidden states, and remembers for how many at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = torch.randn(PADDED, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.table[VOCAB:] = 100.0  # padding is never predicted
        self.rows: list[int] = []

    def forward(self, hidden: Tensor, *, scale: float) -> tuple[Tensor, None]:
        self.rows.append(hidden.shape[0] * hidden.shape[1])
        return scale * hidden.abs() @ self.table.T, None  # [n, b, padded v]


class Model(nn.Module):
    """Embeds tokens and predicts with `Head`; token 0 has hidden states that are no numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
        self.table[0] = torch.nan
        self.output_layer = Head(dtype)
        self.config = None  # read by pipeline stages only

    def forward(self, tokens: Tensor, position_ids: Tensor, mask: None, **options: Any) -> Tensor:
        hidden = self.table[tokens.T] * (1 + position_ids.T[..., None])  # [n, b, h]
        logits, _ = self.output_layer(hidden, scale=2.0)
        return logits.transpose(0, 1)  # [b, n, padded v]


def parallel(model: nn.Module, groups: ProcessGroupCollection) -> ParallelModel:
    ctx = RunContext(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        layout=resolve_layout(ParallelConfig(), 1),
        groups=groups,
        data_parallel_rank=0,
        num_threads=1,
    )
    return ParallelModel(model, ctx, vocab_size=VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_logits_are_held_at_a_time(
    dtype: torch.dtype, single_rank: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_model, "_LEAST_HEAD_ROWS", 2)
    monkeypatch.setattr(parallel_model, "_MOST_LOGITS", 5 * VOCAB + 1)
    model = Model(dtype)
    ranks = parallel(model, single_rank)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (3, 7), generator=generator)
    positions = torch.arange(7).expand(3, 7)
    logits = ranks.logits(tokens, positions)
    assert logits is not None and logits.shape == (3, 7, VOCAB)
    model.output_layer.rows.clear()
    found = ranks.likeliest(tokens, positions)
    assert found is not None
    ids, values = found
    # One row for nothing, then all 21 by fives.
    assert model.output_layer.rows == [1, 5, 5, 5, 5, 1]
    is_number = tokens != 0
    assert 0 < is_number.sum() < 21
    expected = logits.float().max(dim=-1)
    assert torch.equal(ids[is_number], expected.indices[is_number])
    torch.testing.assert_close(values, expected.values, equal_nan=True)
    assert torch.equal(values.isfinite(), is_number) and values.dtype == torch.float32


def windows_of(lengths: Sequence[int]) -> list[Window]:
    # Token 0 is in the first window alone, at its second place.
    return [
        Window(
            domain=0,
            tokens=np.array([0 if (number, n) == (0, 1) else 1 + n for n in range(length)], "i4"),
            following=-1,
        )
        for number, length in enumerate(lengths)
    ]


def test_windows_of_any_length_share_a_pass(single_rank: ProcessGroupCollection) -> None:
    model = Model(torch.float32)
    lengths = [3, 6, 1, 6]
    windows = windows_of(lengths)
    part = run_windows(
        parallel(model, single_rank),
        RoutingCapture({}),
        windows,
        tokens_per_batch=18,
        rank=0,
        size=1,
        is_kept=True,
    )
    assert sorted(part.windows) == [0, 1, 2, 3] and part.num_broken == 1
    for number, predicted in zip(part.windows, part.predicted, strict=True):
        tokens = torch.from_numpy(windows[number].tokens.astype(np.int64))
        hidden = model.table[tokens] * (1 + torch.arange(len(tokens))[:, None])
        best = (hidden.abs() @ model.output_layer.table[:VOCAB].T).argmax(dim=-1)
        assert predicted.dtype == np.int32
        known = tokens != 0
        assert torch.from_numpy(predicted).long()[known].tolist() == best[known].tolist()


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 1)])
def test_padding_is_in_no_count(lengths: tuple[int, ...]) -> None:
    batch, longest, experts, topk = len(lengths), 5, 6, 2
    logits = torch.randn(longest, batch, experts, generator=torch.Generator().manual_seed(4))
    part = RouterPart()
    part.add(softmax_topk(logits.view(-1, experts), topk), lengths)
    for number, length in enumerate(lengths):
        mine = logits[:length, number].double().softmax(dim=-1)  # [n, e]
        best = mine.topk(topk)
        assert part.experts[number].tolist() == best.indices.tolist()
        np.testing.assert_allclose(part.gates[number], best.values, rtol=1e-5)
        flat = best.indices.flatten().tolist()
        assert part.counts[number].tolist() == [flat.count(expert) for expert in range(experts)]
        np.testing.assert_allclose(part.scores[number], mine.sum(dim=0), rtol=1e-5)
        entropy = -(mine * mine.log()).sum()
        assert part.entropy[number] == pytest.approx(float(entropy), rel=1e-5)
        types = (part.experts, part.gates, part.counts, part.scores)
        assert [each[number].dtype for each in types] == ["int16", "float32", "int32", "float64"]
