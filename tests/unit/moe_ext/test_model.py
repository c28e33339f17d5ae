"""The whole model: a vocabulary that padding does not change."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel

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


@pytest.mark.parametrize("is_tied", [False, True])
def test_names_logits_and_gradients_are_those_of_megatron_cores_gpt_model(is_tied: bool) -> None:
    cfg = PretrainConfig(
        model=MoEModelConfig(
            num_layers=2,
            num_experts=4,
            moe_router_topk=2,
            vocab_size=48,
            make_vocab_size_divisible_by=48,
            untie_embeddings_and_output_weights=not is_tied,
        ),
        training=TrainingConfig(global_batch_size=1, seq_length=16),
    )
    ctx = initialize(cfg)
    try:
        (ours,) = build_chunks(cfg, ctx, seed=3).chunks
        theirs = GPTModel(
            ours.config,
            ours.decoder.submodules,
            vocab_size=48,
            max_sequence_length=16,
            position_embedding_type="rope",
            rotary_base=cfg.model.rotary_base,
            share_embeddings_and_output_weights=is_tied,
            pg_collection=ctx.groups,
        )
        theirs.load_state_dict(ours.state_dict())
        tokens = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(9)[None].expand(2, 9)
        logits = [model(tokens, positions, None) for model in (ours, theirs)]  # [b, s, v]
        for value in logits:
            F.cross_entropy(value.flatten(0, 1), tokens.flatten()).backward()
        assert torch.equal(*logits)
        truth = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            assert weight.grad is not None
            assert torch.equal(weight.grad, truth[name].grad), name
        saved = [model.sharded_state_dict() for model in (ours, theirs)]
        assert list(saved[0]) == list(saved[1])
        for name, entry in saved[0].items():
            if isinstance(entry, ShardedTensor):
                assert entry.global_shape == saved[1][name].global_shape
                assert entry.key == saved[1][name].key
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
