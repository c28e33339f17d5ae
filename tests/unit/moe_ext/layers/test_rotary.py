"""Positions: the angles follow the ids, and the model follows the angles."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron.trainer.config.schema import TrainingConfig
from megatron.trainer.runtime.launch import initialize, shut_down
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.layers.rotary import RotaryAngles
from moe_ext.model import LanguageModel


def test_counting_positions_give_megatron_cores_angles_bit_for_bit() -> None:
    ours = RotaryAngles(8, base=10000)(torch.arange(300)[None])  # [s, 1, 1, hn]
    plain = RotaryEmbedding(8, rotary_percent=1.0, use_cpu_initialization=True)
    angles = torch.arange(300, dtype=torch.float32)[:, None] * plain.inv_freq  # [s, hn / 2]
    assert torch.equal(ours[:, 0, 0], torch.cat((angles, angles), dim=-1))


def test_each_row_has_its_own_positions() -> None:
    angles = RotaryAngles(4, base=100)(torch.tensor([[0, 1, 2], [7, 0, 5]]))  # [s, b, 1, hn]
    assert angles.shape == (3, 2, 1, 4)
    # theta 100 and two pairs: frequencies 1 and 1/10
    expected = torch.tensor([7.0, 0.7, 7.0, 0.7])
    assert torch.allclose(angles[0, 1, 0], expected)
    assert torch.allclose(angles[2, 1, 0], expected * 5 / 7)


@pytest.fixture
def model() -> Iterator[LanguageModel]:
    cfg = PretrainConfig(
        model=MoEModelConfig(num_layers=2, num_experts=4, moe_router_topk=2, vocab_size=128),
        training=TrainingConfig(global_batch_size=1, seq_length=16),
    )
    ctx = initialize(cfg)
    (chunk,) = build_chunks(cfg, ctx, seed=3).chunks
    yield chunk.eval()
    shut_down()


@torch.no_grad()
def test_model_sees_position_differences_and_nothing_else(model: LanguageModel) -> None:
    tokens = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(1))
    counting = torch.arange(9)[None]
    plain = model(tokens, counting)
    # Attention depends on differences of positions alone, so a common shift changes nothing...
    shifted = model(tokens, counting + torch.tensor([[0], [5]]))
    assert torch.allclose(plain, shifted, atol=1e-5)
    # ... and another distance does.
    stretched = model(tokens, counting * torch.tensor([[1], [3]]))
    assert torch.allclose(stretched[0], plain[0], atol=1e-5)
    assert (stretched[1] - plain[1]).abs().max() > 1e-3
