"""The whole model: a vocabulary that padding does not change."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron.trainer.config.schema import TrainingConfig
from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import initialize, shut_down
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.model import LanguageModel

ModelMaker = Callable[[int], LanguageModel]


@pytest.fixture
def make_model() -> Iterator[ModelMaker]:
    cfg = PretrainConfig(training=TrainingConfig(global_batch_size=1, seq_length=16))
    ctx = initialize(cfg)

    def build(multiple: int) -> LanguageModel:
        model = MoEModelConfig(
            num_layers=1,
            num_experts=4,
            moe_router_topk=2,
            vocab_size=50,
            make_vocab_size_divisible_by=multiple,
        )
        chunks = build_chunks(PretrainConfig(model=model), ctx, seed=3).chunks
        return chunks[0].eval()

    yield build
    shut_down()


def test_an_unregistered_backend_is_named_without_a_traceback() -> None:
    ctx = initialize(PretrainConfig())
    try:
        with pytest.raises(ConfigError, match=r"did you mean 'grouped'\?$"):
            model = MoEModelConfig(expert_backend="groupd")
            build_chunks(PretrainConfig(model=model), ctx, seed=None)
    finally:
        shut_down()


def tokens_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def test_padding_rows_change_neither_loss_nor_gradients(make_model: ModelMaker) -> None:
    tokens, labels = tokens_and_labels()
    bare, padded = make_model(1), make_model(64)
    weights = dict(bare.named_parameters())
    with torch.no_grad():
        for name, weight in padded.named_parameters():
            rows = weights[name].shape[0]
            weight[:rows] = weights[name]
            weight[rows:] = 3.0  # padding that would matter if it counted
    positions = torch.arange(9)[None]
    losses = []
    for model in (bare, padded):
        loss = model(tokens, positions, labels=labels)
        loss.mean().backward()
        losses.append(loss.detach())
    # The sum over the vocabulary is grouped otherwise.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for name, weight in padded.named_parameters():
        truth = weights[name].grad
        assert weight.grad is not None
        assert truth is not None
        rows = truth.shape[0]
        torch.testing.assert_close(weight.grad[:rows], truth, rtol=1e-4, atol=1e-7)
        assert not weight.grad[rows:].any(), name


def test_loss_is_the_cross_entropy_over_the_real_tokens(make_model: ModelMaker) -> None:
    tokens, labels = tokens_and_labels()
    model = make_model(64)
    positions = torch.arange(9)[None]
    with torch.no_grad():
        logits = model(tokens, positions)  # [b, s, 64]
        loss = model(tokens, positions, labels=labels)
    assert torch.isneginf(logits[..., 50:]).all()
    assert logits[..., :50].isfinite().all()
    expected = F.cross_entropy(logits[..., :50].flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(loss.flatten(), expected, rtol=1e-5, atol=1e-6)
