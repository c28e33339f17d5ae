"""Documents packed into a sequence train like documents on their own, with no id between them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import DataError
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.state import TrainState
from megatron.trainer.step import evaluate, train_step
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import parse_recipe
from moe_ext.model import LanguageModel
from tests.distributed.launcher import flags

# megatron-core 0.16's own RowParallelLinear does not hand its group on.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

StateMaker = Callable[..., TrainState]
RESETS = {"reset-position-ids": True, "reset-attention-mask": True}
# Auxiliary losses and clipping would depend on which tokens are routed together.
ALONE: dict[str, Any] = {"moe-aux-loss-coeff": 0, "moe-z-loss-coeff": 0, "clip-grad": 0}
S = 16


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Random texts of 1 to 12 tokens, none of which ends a document."""
    generator = np.random.default_rng(5)
    return [generator.integers(1, 120, n).tolist() for n in generator.integers(1, 13, 200)]


@pytest.fixture(scope="module")
def prefix(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("packed") / "web")
    with TokenFileWriter(path, vocab_size=120) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.finish()
    return path


def segments(window: Sequence[int], documents: list[list[int]]) -> list[slice]:
    """The documents' parts of a window of s + 1 tokens, found by their text."""
    text = [token for ids in documents for token in ids]
    firsts = set(np.cumsum([0, *map(len, documents)]).tolist())
    (at,) = (n for n in range(len(text) - S) if text[n : n + S + 1] == list(window))
    cuts = [0, *(n for n in range(1, S) if at + n in firsts), S]
    return [slice(*pair) for pair in itertools.pairwise(cuts)]


def loss_apart(model: torch.nn.Module, windows: Tensor, documents: list[list[int]]) -> Tensor:
    """Mean cross-entropy of [n, s + 1] tokens, each document's part a sequence of its own."""
    losses = []
    for window in windows:
        for part in segments(window.tolist(), documents):
            tokens, labels = window[:-1][part][None], window[1:][part]
            positions = torch.arange(tokens.shape[1])[None]
            logits = model(tokens, positions, None)[0]  # [s of the part, v]
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses).mean()


def test_packed_documents_give_the_loss_and_the_gradients_of_documents_alone(
    make_state: StateMaker, documents: list[list[int]], prefix: str
) -> None:
    state = make_state(data_path=prefix, **ALONE, **RESETS)
    cfg = parse_recipe(flags(device="cpu", **ALONE), prog="test", description="")
    truth = build_chunks(cfg, state.ctx, seed=cfg.training.seed).chunks[0]
    sampler = state.train_data._sampler.copy()
    (source,) = state.train_data.sources
    numbers = source.windows_of(sampler.draw(8)[1]).tolist()
    windows = torch.stack(
        [torch.from_numpy(source.read_window(n).astype(np.int64)) for n in numbers]
    )
    result = train_step(state, NEXT_TOKEN)
    expected = loss_apart(truth, windows, documents)
    expected.backward()

    # fp32: sums of some hundred terms in another order.
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    model = state.modules[0]
    assert isinstance(model, LanguageModel)
    found = dict(model.named_parameters())
    for name, parameter in truth.named_parameters():
        gradient = found[name].main_grad
        distance = torch.linalg.vector_norm(gradient - parameter.grad)
        assert distance <= 1e-4 * torch.linalg.vector_norm(parameter.grad), name


def test_each_reset_changes_training_and_evaluation(make_state: StateMaker, prefix: str) -> None:
    """The comparison above means nothing if the borders did."""
    cases = ({}, *({key: True} for key in RESETS), RESETS)
    losses = []
    for case in cases:
        state = make_state(data_path=prefix, split="3,1", **ALONE, **case)
        found = evaluate(state, NEXT_TOKEN, "web")
        assert found is not None
        losses.append((train_step(state, NEXT_TOKEN).loss, found["lm_loss"]))
    for neither, positions, mask, both in zip(*losses, strict=True):
        assert len({round(neither, 4), round(positions, 4), round(mask, 4)}) == 3
        # Rotary embeddings are relative: within a document they do not depend on where it begins.
        assert both == pytest.approx(mask, rel=1e-6)


def test_id_that_ends_no_document_is_refused_before_the_model_is_built(
    make_state: StateMaker, prefix: str
) -> None:
    with pytest.raises(
        DataError,
        match=r"^--eod-token-id 0 is not what ends documents in source 'web': of 200 documents"
        r" looked at, of 200 in .*web\.idx, 0 end with it and 0 hold it before their end",
    ):
        make_state(data_path=prefix, eod_token_id=0, **RESETS)
