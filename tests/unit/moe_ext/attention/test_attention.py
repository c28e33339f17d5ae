"""Core attention against a softmax written out; QK-norm against torch's RMSNorm of the whole."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.attention import QKNormSelfAttention, SDPACoreAttention

ConfigMaker = Callable[..., TransformerConfig]

# megatron-core 0.16's own RowParallelLinear does not hand its group on.
TP_GROUP_WARNING = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One query at a time: [s, b, np, hn] to [s, b, np * hn]."""
    length, batch, heads, _ = q.shape
    shared = heads // k.shape[2]
    rows = []
    for i in range(length):
        row = []
        for b in range(batch):
            for n in range(heads):
                end = i + 1 if causal else k.shape[0]
                scores = scale * (k[:end, b, n // shared] @ q[i, b, n])
                row.append(scores.softmax(0) @ v[:end, b, n // shared])
        rows.append(torch.stack(row).view(batch, -1))
    return torch.stack(rows)


def core_attention(config: TransformerConfig, **changes: Any) -> SDPACoreAttention:
    arguments: dict[str, Any] = {
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
    }
    return SDPACoreAttention(config=config, **{**arguments, **changes})


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_equals_the_written_out_softmax_with_gradients(
    make_config: ConfigMaker, groups: int, causal: bool, scale: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(5, 2, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, groups, groups)
    ]
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    output = core_attention(make_config(), softmax_scale=scale)(
        *inputs, None, attn_mask_type=mask_type
    )
    expected = naive_attention(*inputs, causal=causal, scale=scale or 3**-0.5)
    # float64 softmax over five terms of order one.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for grad, truth in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_hides_what_it_marks_with_gradients(make_config: ConfigMaker, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(5, 2, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    # Positions 0 to 2 are one document and 3, 4 the next, in the first row or in all.
    document = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])[:rows]
    hidden = (document[:, :, None] != document[:, None, :]) | torch.ones(5, 5).triu(1).bool()
    output = core_attention(make_config())(*inputs, hidden[:, None])
    apart = torch.cat(
        [
            naive_attention(*(x[part] for x in inputs), causal=True, scale=3**-0.5)
            for part in (slice(0, 3), slice(3, 5))
        ]
    )
    whole = naive_attention(*inputs, causal=True, scale=3**-0.5)
    expected = apart if rows == 1 else torch.stack((apart[:, 0], whole[:, 1]), dim=1)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for grad, truth in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12)


def test_context_parallelism_needs_the_ranks(make_config: ConfigMaker) -> None:
    config = make_config()
    config.context_parallel_size = 2
    message = "context_parallel_size is 2, but there is no pg_collection with the ranks"
    with pytest.raises(ValueError, match=re.escape(message)):
        core_attention(config)


def test_the_output_is_contiguous_and_the_default_mask_is_the_constructors(
    make_config: ConfigMaker,
) -> None:
    q, k, v = torch.randn(3, 5, 2, 4, 3, dtype=torch.float64).unbind(0)
    output = core_attention(make_config())(q, k, v, None)
    assert output.is_contiguous()
    expected = naive_attention(q, k, v, causal=True, scale=3**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attn_mask_type": AttnMaskType.padding},
            "attn_mask_type is padding, but this attention knows causal and no_mask",
        ),
        (
            {
                "attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool),
                "attn_mask_type": AttnMaskType.no_mask,
            },
            "got an attention_mask [2, 1, 5, 5] with attn_mask_type no_mask, which needs none and "
            "would ignore it; pass None",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)},
            "attention_mask is [2, 1, 5, 4] torch.bool, but must be [2, 1, 5, 5] torch.bool, True "
            "where a query must not look",
        ),
        (
            {"attention_mask": torch.zeros(2, 1, 5, 5)},
            "attention_mask is [2, 1, 5, 5] torch.float32, but must be [2, 1, 5, 5] torch.bool",
        ),
        (
            {"packed_seq_params": "some"},
            "packed_seq_params is 'some', but SDPACoreAttention needs PackedDocuments",
        ),
        ({"attention_bias": 1}, "attention_bias is 1, but SDPACoreAttention needs None"),
        (
            {"query": torch.zeros(1, 2, 4, 3)},
            "causal attention needs as many queries (1) as keys (5); use attn_mask_type no_mask "
            "for a single new token",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_at_the_call(
    make_config: ConfigMaker, arguments: dict[str, Any], message: str
) -> None:
    tensors = {name: torch.zeros(5, 2, 4, 3) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=re.escape(message)):
        core_attention(make_config())(**{"attention_mask": None, **tensors, **arguments})


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("attention_dropout", 0.1, 0.0),
        ("window_size", (4, 0), None),
        ("softmax_type", "learnable", "vanilla"),
    ],
)
def test_what_it_cannot_do_is_refused_when_built(
    make_config: ConfigMaker, field: str, value: object, needed: object
) -> None:
    config = make_config()
    setattr(config, field, value)
    message = f"{field} is {value!r}, but SDPACoreAttention needs {needed!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        core_attention(config)


def build_self_attention(
    config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> QKNormSelfAttention:
    return QKNormSelfAttention(
        config,
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
        ),
        layer_number=1,
        pg_collection=pg_collection,
    )


@pytest.fixture
def attention(single_rank: ProcessGroupCollection, make_config: ConfigMaker) -> QKNormSelfAttention:
    torch.manual_seed(0)
    config = make_config(
        num_attention_heads=4, num_query_groups=2, kv_channels=3, init_method_std=0.5
    )
    block = build_self_attention(config, single_rank)
    with torch.no_grad():
        block.q_norm.weight.normal_()
        block.k_norm.weight.normal_()
    return block


def test_q_and_k_are_normalised_over_all_heads_jointly_and_v_is_not(
    attention: QKNormSelfAttention,
) -> None:
    hidden = torch.randn(5, 2, 8, dtype=torch.float64)
    query, key, value = attention.get_query_key_value_tensors(hidden)
    # megatron-core's fused projection: per key head, its query heads, then k, then v.
    fused = (hidden @ attention.linear_qkv.weight.T).view(5, 2, 2, 4, 3)
    for actual, raw, norm in (
        (query, fused[..., :2, :].reshape(5, 2, 12), attention.q_norm),
        (key, fused[..., 2, :].reshape(5, 2, 6), attention.k_norm),
    ):
        expected = F.rms_norm(raw, (raw.shape[-1],), norm.weight, 1e-5)
        torch.testing.assert_close(actual.flatten(2), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, fused[..., 3, :], rtol=1e-12, atol=1e-12)


@TP_GROUP_WARNING
def test_the_whole_block_equals_the_written_out_attention(attention: QKNormSelfAttention) -> None:
    hidden = torch.randn(5, 2, 8, dtype=torch.float64)
    output, bias = attention(hidden, attention_mask=None)
    qkv = attention.get_query_key_value_tensors(hidden)
    context = naive_attention(*qkv, causal=True, scale=3**-0.5)
    assert bias is None
    torch.testing.assert_close(
        output, context @ attention.linear_proj.weight.T, rtol=1e-10, atol=1e-12
    )


@TP_GROUP_WARNING
def test_selective_recompute_gives_the_same_gradients(attention: QKNormSelfAttention) -> None:
    hidden = torch.randn(5, 2, 8, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        attention.zero_grad()
        output, _ = attention(hidden, attention_mask=None)
        output.square().sum().backward()
        return [weight.grad for weight in attention.parameters()]

    plain = gradients()
    attention.checkpoint_core_attention = True
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_norm_weights_are_marked_as_split_and_saved_as_one_vector(
    attention: QKNormSelfAttention,
) -> None:
    weights: list[Any] = [attention.q_norm.weight, attention.k_norm.weight]
    for weight, size in zip(weights, (12, 6), strict=True):
        assert weight.shape == (size,)
        assert weight.tensor_model_parallel is True
        assert weight.partition_dim == 0
        assert not getattr(weight, "sequence_parallel", False)
    shards = attention.sharded_state_dict("attn.", ((0, 2, 5),))
    assert shards["attn.q_norm.weight"].data is attention.q_norm.weight
    assert shards["attn.q_norm.weight"].global_shape == (5, 12)
    assert shards["attn.k_norm.weight"].global_offset == (2, 0)


def test_a_fused_rotary_projection_is_refused(attention: QKNormSelfAttention) -> None:
    message = "fused_single_qkv_rope is True, but QK-norm needs q and k apart; set it to False"
    with pytest.raises(ValueError, match=re.escape(message)):
        attention.get_query_key_value_tensors(torch.zeros(5, 2, 8), split_qkv=False)


def test_it_builds_on_the_meta_device(
    single_rank: ProcessGroupCollection, make_config: ConfigMaker
) -> None:
    build = functools.partial(build_self_attention, make_config(), single_rank)
    with torch.device("meta"):
        attention = build()
    assert attention.q_norm.weight.is_meta
    assert attention.k_norm.weight.is_meta
