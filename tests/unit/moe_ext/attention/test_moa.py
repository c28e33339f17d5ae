"""Mixture of attention heads against transformers' JetMoE layer and against dense attention."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

from moe_ext.attention import MoASelfAttention, MoASubmodules, SDPACoreAttention
from moe_ext.experts import look_up_backend
from moe_ext.metrics import RouterMetrics
from moe_ext.routers import MoERouter, SoftmaxTopKRouter, TopKSoftmaxRouter

ConfigMaker = Callable[..., TransformerConfig]
AttentionMaker = Callable[..., MoASelfAttention]

SEQUENCE, BATCH, WIDTH, GROUPS, HEAD_SIZE, EXPERTS = 7, 2, 14, 3, 6, 5
"""GROUPS x HEAD_SIZE is not WIDTH."""


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline schedule would set before backward."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))


@pytest.fixture
def build(single_rank: ProcessGroupCollection, make_config: ConfigMaker) -> AttentionMaker:
    """Builds an attention with random weights, biases included."""

    def attention(
        *,
        topk: int = 2,
        experts: int = EXPERTS,
        backend: str = "grouped",
        router: type[MoERouter] = TopKSoftmaxRouter,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        **changes: Any,
    ) -> MoASelfAttention:
        fields = {
            "hidden_size": WIDTH,
            "num_query_groups": GROUPS,
            "num_attention_heads": GROUPS * topk,
            "kv_channels": HEAD_SIZE,
        }
        size: dict[str, Any] = {"num_experts": experts, "topk": topk}
        gate = functools.partial(
            router,
            aux_loss_coeff=aux_loss_coeff,
            z_loss_coeff=z_loss_coeff,
            router_dtype=None,
            metrics=RouterMetrics(2, experts),
            **size,
        )
        built = MoASelfAttention(
            make_config(**{**fields, **changes}),
            MoASubmodules(router=gate, core_attention=SDPACoreAttention),
            layer_number=2,
            pg_collection=single_rank,
            backend=look_up_backend(backend),
            **size,
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in built.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        return built

    return attention


def random_hidden(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator).to(dtype).requires_grad_()


def rotary_angles(dtype: torch.dtype = torch.float32) -> Tensor:
    """[s, 1, 1, hn] of positions 0, 1, ..."""
    steps = 10000.0 ** (-torch.arange(0, HEAD_SIZE, 2).to(dtype) / HEAD_SIZE)
    angles = torch.arange(SEQUENCE).to(dtype)[:, None] * steps  # [s, hn / 2]
    return torch.cat((angles, angles), dim=1)[:, None, None, :]


def output_and_gradients(attention: MoASelfAttention, hidden: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of hidden and of every parameter by name."""
    output, bias = attention(hidden, None, rotary_pos_emb=rotary_angles())
    assert bias is None
    leaves = {"hidden": hidden, **dict(attention.named_parameters())}
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"output": output, **dict(zip(leaves, gradients, strict=True))}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # float64 through a softmax and a few hundred additions.
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=name)


def transformers_layer(attention: MoASelfAttention, topk: int) -> JetMoeAttention:
    """The reference with the same weights; k and v of all heads one after the other."""
    fields: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_key_value_heads": GROUPS,
        "kv_channels": HEAD_SIZE,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": topk,
        "attn_implementation": "eager",
    }
    reference = JetMoeAttention(JetMoeConfig(**fields), layer_idx=0)
    by_head = attention.linear_kv.weight.view(GROUPS, 2, HEAD_SIZE, WIDTH)
    with torch.no_grad():
        reference.kv_proj.weight.copy_(by_head.transpose(0, 1).reshape(-1, WIDTH))
        reference.experts.router.layer.weight.copy_(attention.router.weight)
        reference.experts.input_linear.weight.copy_(attention.experts.weight_q)
        reference.experts.output_linear.weight.copy_(attention.experts.weight_o)
        reference.experts.bias.copy_(attention.output_bias)
    return reference


def transformers_output_and_gradients(reference: JetMoeAttention) -> dict[str, Tensor]:
    hidden = random_hidden(torch.float32)
    rows = hidden.transpose(0, 1)  # [b, s, h]
    positions = torch.arange(SEQUENCE)[None]
    angles = JetMoeRotaryEmbedding(reference.config)(rows, positions)
    mask = torch.full((SEQUENCE, SEQUENCE), -math.inf).triu(1)[None, None]
    output = reference(rows, attention_mask=mask, position_embeddings=angles)[0].transpose(0, 1)
    upstream = torch.linspace(-1, 1, output.numel()).view(SEQUENCE, BATCH, WIDTH)
    leaves = {
        "hidden": hidden,
        "router.weight": reference.experts.router.layer.weight,
        "linear_kv.weight": reference.kv_proj.weight,
        "experts.weight_q": reference.experts.input_linear.weight,
        "experts.weight_o": reference.experts.output_linear.weight,
        "output_bias": reference.experts.bias,
    }
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    found = {"output": output, **dict(zip(leaves, gradients, strict=True))}
    blocks = found["linear_kv.weight"].view(2, GROUPS, HEAD_SIZE, WIDTH)
    found["linear_kv.weight"] = blocks.transpose(0, 1).reshape(-1, WIDTH)
    return found


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_it_is_transformers_layer_with_all_gradients(
    build: AttentionMaker, topk: int, backend: str
) -> None:
    attention = build(topk=topk, backend=backend, params_dtype=torch.float32)
    expected = transformers_output_and_gradients(transformers_layer(attention, topk))
    actual = output_and_gradients(attention, random_hidden(torch.float32))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # fp32 sums in another order.
        limit = 2e-5 if name == "output" else 1e-4
        if topk == 1 and name == "router.weight":
            assert not value.any() and not actual[name].any()  # one gate is always 1
            continue
        difference = torch.linalg.vector_norm(actual[name] - value)
        assert difference <= limit * torch.linalg.vector_norm(value), name


def dense_attention(attention: MoASelfAttention, expert: int, hidden: Tensor) -> Tensor:
    """Multi-head attention with one expert's projections, token by token, without rotation."""
    key, value = (
        (hidden @ attention.linear_kv.weight.T).unflatten(2, (GROUPS, 2, HEAD_SIZE)).unbind(3)
    )
    query = (hidden @ attention.experts.weight_q[expert].T).unflatten(2, (GROUPS, HEAD_SIZE))
    rows = []
    for i in range(SEQUENCE):
        scores = torch.einsum("bgd,sbgd->sbg", query[i], key[: i + 1]) / HEAD_SIZE**0.5
        rows.append(torch.einsum("sbg,sbgd->bgd", scores.softmax(0), value[: i + 1]).flatten(1))
    return torch.stack(rows) @ attention.experts.weight_o[expert].T + attention.output_bias


def test_one_expert_is_dense_attention_with_a_bias(build: AttentionMaker) -> None:
    attention = build(topk=1, experts=1)
    hidden = random_hidden()
    output, _ = attention(hidden, None)
    expected = dense_attention(attention, 0, hidden)
    leaves = [hidden, attention.linear_kv.weight, *attention.experts.parameters()]
    upstream = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
    for actual, truth in zip(
        torch.autograd.grad(output, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-11)


def test_equal_experts_are_dense_attention_whatever_the_routing(build: AttentionMaker) -> None:
    attention = build(topk=3)
    with torch.no_grad():
        for weight in attention.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    hidden = random_hidden()
    output, _ = attention(hidden, None)
    # The gates of a token sum to 1.
    expected = dense_attention(attention, 4, hidden)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)


def test_the_numbering_of_the_experts_and_slots_does_not_matter(build: AttentionMaker) -> None:
    """Renumbering also reorders each token's slots, which follow the experts' numbers."""
    attention, permuted = build(), build()
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for weight in (permuted.router.weight, *permuted.experts.parameters()):
            weight.copy_(weight[order])
    expected = output_and_gradients(attention, random_hidden())
    actual = output_and_gradients(permuted, random_hidden())
    for name in ("router.weight", "experts.weight_q", "experts.weight_o"):
        expected[name] = expected[name][order]
    assert_all_close(actual, expected)


def test_grouped_queries_are_the_tiled_heads_in_another_order(build: AttentionMaker) -> None:
    """Slot-major heads against tiled keys and values give what the core attention was asked."""
    attention = build(topk=3)
    asked: list[Tensor] = []

    def record(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        asked.extend([*inputs[:3], output])

    attention.core_attention.register_forward_hook(record)
    attention(random_hidden(), None, rotary_pos_emb=rotary_angles())
    query, key, value, context = asked
    assert key.shape == value.shape == (SEQUENCE, BATCH, GROUPS, HEAD_SIZE)
    assert query.shape == (SEQUENCE, BATCH, GROUPS * 3, HEAD_SIZE)
    slot_major = query.unflatten(2, (GROUPS, 3)).transpose(2, 3).flatten(2, 3)  # head j * ng + g
    heads = (slot_major, key.repeat(1, 1, 3, 1), value.repeat(1, 1, 3, 1))
    q, k, v = (x.permute(1, 2, 0, 3) for x in heads)  # [b, k * ng, s, hn]
    tiled = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    tiled = tiled.permute(2, 0, 1, 3)  # [s, b, k * ng, hn]
    found = context.unflatten(2, (GROUPS, 3, HEAD_SIZE)).transpose(2, 3).flatten(2, 3)
    torch.testing.assert_close(found, tiled, rtol=1e-10, atol=1e-12)


def test_a_zero_router_has_a_balance_of_one_and_a_z_loss_of_ln_e_squared(
    build: AttentionMaker,
) -> None:
    attention = build()
    with torch.no_grad():
        attention.router.weight.zero_()
    attention(random_hidden(), None)
    report = attention.router.metrics.reduce()
    assert report.layer_load_balancing_loss[1] == pytest.approx(1.0, rel=1e-12)
    assert report.layer_z_loss[1] == pytest.approx(math.log(EXPERTS) ** 2, rel=1e-12)
    assert math.isnan(report.layer_z_loss[0])


def test_the_routers_losses_ride_on_the_gates(build: AttentionMaker) -> None:
    """With a gradient of zero from above, the router still gets that of its own losses."""
    attention = build(aux_loss_coeff=0.3, z_loss_coeff=0.07)
    hidden = random_hidden()
    output, _ = attention(hidden, None)
    (output * 0.0).sum().backward()
    router = attention.router.weight.detach().clone().requires_grad_()
    logits = hidden.detach().flatten(0, 1) @ router.T
    scores = logits.softmax(1)
    counts = torch.zeros_like(scores).scatter(1, logits.topk(2).indices, 1.0).mean(0) / 2
    balance = EXPERTS * (counts * scores.mean(0)).sum()
    (0.3 * balance + 0.07 * logits.logsumexp(1).square().mean()).backward()
    assert attention.router.weight.grad is not None and router.grad is not None
    torch.testing.assert_close(attention.router.weight.grad, router.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("router", [TopKSoftmaxRouter, SoftmaxTopKRouter])
def test_gates_multiply_the_output_and_not_the_bias(
    build: AttentionMaker, router: type[MoERouter]
) -> None:
    attention = build(topk=2, router=router)
    hidden = random_hidden()
    output, _ = attention(hidden, None)
    routing = attention.router(hidden)
    probs = routing.scores.new_zeros(routing.scores.shape).scatter(1, *routing[:2])
    every = torch.stack([dense_attention(attention, e, hidden) for e in range(EXPERTS)])
    alone = every - attention.output_bias  # [e, s, b, h]
    expected = torch.einsum("esbh,sbe->sbh", alone, probs.view(SEQUENCE, BATCH, EXPERTS))
    torch.testing.assert_close(output, expected + attention.output_bias, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
def test_recomputed_core_attention_gives_the_same_gradients(build: AttentionMaker) -> None:
    plain = output_and_gradients(build(), random_hidden())
    again = build(recompute_granularity="selective", recompute_modules=["core_attn"])
    calls: list[Any] = []
    again.core_attention.register_forward_hook(lambda *_: calls.append(1))
    output, _ = again(random_hidden(), None, rotary_pos_emb=rotary_angles())
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    output.backward(upstream)
    assert len(calls) == 2
    gradients = {name: weight.grad for name, weight in again.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None
        assert_all_close({name: gradient}, {name: plain[name]})


def test_an_expert_without_tokens_has_a_zero_gradient(build: AttentionMaker) -> None:
    attention = build(topk=1)
    hidden = random_hidden().detach().abs().requires_grad_()
    with torch.no_grad():
        attention.router.weight.fill_(-1.0)
        attention.router.weight[2] = 1.0
    found = output_and_gradients(attention, hidden)
    for name in ("experts.weight_q", "experts.weight_o"):
        idle = [e for e in range(EXPERTS) if e != 2]
        assert not found[name][idle].any()
        assert found[name][2].any()


def test_evaluation_of_one_token_records_nothing(build: AttentionMaker) -> None:
    attention = build().eval()
    with torch.no_grad():
        output, _ = attention(random_hidden()[:1], None, rotary_pos_emb=rotary_angles()[:1])
    assert output.shape == (1, BATCH, WIDTH)
    assert attention.router.metrics.reduce().as_dict("moa") == {}


def test_bf16_stays_bf16(build: AttentionMaker) -> None:
    attention = build(params_dtype=torch.bfloat16)
    found = output_and_gradients(attention, random_hidden(torch.bfloat16))
    expected = output_and_gradients(build(), random_hidden())
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    # Routing may flip at rounding, so only the size of the difference is bounded.
    difference = torch.linalg.vector_norm(found["output"].double() - expected["output"])
    assert difference <= 0.1 * torch.linalg.vector_norm(expected["output"])
