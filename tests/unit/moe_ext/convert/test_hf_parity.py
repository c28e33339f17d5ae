"""Compare native models with transformers' own at equal weights: logits, loss, gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_app.convert.hf_verify import bf16_tolerance
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES
from moe_ext.layers.transformer import transformer_config
from tests.distributed.hf_models import (
    fill,
    gradients,
    random_model,
    random_tokens,
    to_hf,
    to_native,
)

# fp32, logits of a few units: rounding of sums in another order.
TOLERANCE = 2e-5

OLMOE_SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one layer, every expert": {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 8},
    "five layers, one expert": {"num_hidden_layers": 5, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "other theta, head size 24": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 523.0},
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "renormalised gates": {"norm_topk_prob": True, "num_experts": 7, "num_experts_per_tok": 5},
    "three heads, own eps": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 0.01,
    },
    "eight of ten experts": {"num_experts": 10, "num_experts_per_tok": 8, "intermediate_size": 7},
}
JETMOE_SHAPES: dict[str, dict[str, Any]] = {
    "two of six": {},
    "one layer, every expert": {
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
    "five layers, one expert": {"num_hidden_layers": 5, "num_experts_per_tok": 1},
    "untied": {"tie_word_embeddings": False},
    "other theta, three heads of 6": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 523.0},
        "num_key_value_heads": 3,
        "kv_channels": 6,
    },
    "five of seven, own eps": {
        "num_local_experts": 7,
        "num_experts_per_tok": 5,
        "rms_norm_eps": 0.01,
    },
    "eight of ten": {"num_local_experts": 10, "num_experts_per_tok": 8, "intermediate_size": 7},
}
OLMO_SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied, other theta": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 523.0},
        "num_key_value_heads": 6,
    },
}
LENGTHS = (1, 2, 17, 128)


def native_model(
    family: str, reference: PreTrainedModel, groups: ProcessGroupCollection, *, bf16: bool = False
) -> tuple[MoEModelConfig, nn.Module]:
    """Build a native model with the reference's weights, without auxiliary losses."""
    described: MoEModelConfig = FAMILIES[family].model_config(reference.config.to_diff_dict())
    changed = {**vars(described), "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    model = MoEModelConfig(**changed)
    config = transformer_config(model, bf16=bf16)
    (chunk,) = build_model(model, config, pg_collection=groups, seq_length=128, seed=None).chunks
    if bf16:
        chunk.bfloat16()
    weights = to_native(family, model, FAMILIES[family].layouts[-1], reference.state_dict())
    fill([chunk], weights)
    return model, chunk.eval()


def native_logits(model: nn.Module, tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute logits [b, s, v] without padding rows."""
    positions = torch.arange(tokens.shape[1])[None]
    return model(tokens, positions, None)[..., :vocab_size]


@pytest.mark.parametrize("name", OLMOE_SHAPES)
def test_olmoe_logits_match_transformers(name: str, single_rank: ProcessGroupCollection) -> None:
    compare_logits("olmoe", OLMOE_SHAPES[name], single_rank)


@pytest.mark.parametrize("name", JETMOE_SHAPES)
def test_jetmoe_logits_match_transformers(name: str, single_rank: ProcessGroupCollection) -> None:
    compare_logits("jetmoe", JETMOE_SHAPES[name], single_rank)


@pytest.mark.parametrize("name", OLMO_SHAPES)
def test_olmo_logits_match_transformers(name: str, single_rank: ProcessGroupCollection) -> None:
    compare_logits("olmo", OLMO_SHAPES[name], single_rank)


def compare_logits(family: str, shape: dict[str, Any], groups: ProcessGroupCollection) -> None:
    reference = random_model(family, **shape)
    model, chunk = native_model(family, reference, groups)
    for length in LENGTHS:
        tokens = random_tokens(reference.config, batch=2, length=length)
        with torch.no_grad():
            expected = reference(tokens, use_cache=False).logits
            found = native_logits(chunk, tokens, model.vocab_size)
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", OLMOE_SHAPES)
def test_olmoe_loss_and_every_gradient_match_transformers(
    name: str, single_rank: ProcessGroupCollection
) -> None:
    compare_gradients("olmoe", OLMOE_SHAPES[name], single_rank)


@pytest.mark.parametrize("name", JETMOE_SHAPES)
def test_jetmoe_loss_and_every_gradient_match_transformers(
    name: str, single_rank: ProcessGroupCollection
) -> None:
    compare_gradients("jetmoe", JETMOE_SHAPES[name], single_rank)


@pytest.mark.parametrize("name", OLMO_SHAPES)
def test_olmo_loss_and_every_gradient_match_transformers(
    name: str, single_rank: ProcessGroupCollection
) -> None:
    compare_gradients("olmo", OLMO_SHAPES[name], single_rank)


def compare_gradients(family: str, shape: dict[str, Any], groups: ProcessGroupCollection) -> None:
    reference = random_model(family, **shape)
    model, chunk = native_model(family, reference, groups)
    tokens = random_tokens(reference.config, batch=3, length=17)
    labels = random_tokens(reference.config, batch=3, length=17, seed=2)

    logits = reference(tokens, use_cache=False).logits
    expected_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected_loss.backward()
    loss = chunk(tokens, torch.arange(17)[None], None, labels=labels).mean()
    loss.backward()

    assert abs(loss.item() - expected_loss.item()) <= 1e-5
    found = to_hf(family, model, FAMILIES[family].layouts[-1], gradients([chunk]))
    parameters = dict(reference.named_parameters())
    assert found.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        norm = parameter.grad.norm()
        # The softmax over one chosen logit is 1, whatever the logit is.
        is_constant = family == "jetmoe" and model.moe_router_topk == 1 and "router" in key
        assert (norm == 0) == is_constant, key
        assert (found[key] - parameter.grad).norm() <= 1e-4 * norm, key


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("olmoe", {}),
        ("olmoe", {"num_hidden_layers": 5, "num_experts_per_tok": 6}),
        ("jetmoe", {}),
        ("jetmoe", {"num_hidden_layers": 5, "num_experts_per_tok": 1}),
        ("olmo", {}),
    ],
)
def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(
    family: str, shape: dict[str, Any], single_rank: ProcessGroupCollection
) -> None:
    reference = random_model(family, **shape)
    nn.Module.to(reference, torch.bfloat16)
    tokens = random_tokens(reference.config, batch=2, length=64)
    model, chunk = native_model(family, reference, single_rank, bf16=True)
    with torch.no_grad():
        found = native_logits(chunk, tokens, model.vocab_size)
        theirs = reference(tokens, use_cache=False).logits
        assert found.dtype == theirs.dtype == torch.bfloat16
        nn.Module.to(reference, torch.float32)  # exactly the same weights
        truth = reference(tokens, use_cache=False).logits
    # Two roundings of about 16 values per layer, independent in sign; see the function.
    limit = bf16_tolerance(model.num_layers, truth.std().item())
    assert (found.float() - theirs.float()).abs().mean() <= limit
    # The factor of 2 covers the random effect of flipped expert choices.
    error, their_error = ((x.float() - truth).square().mean().sqrt() for x in (found, theirs))
    assert their_error / 2 <= error <= 2 * their_error
