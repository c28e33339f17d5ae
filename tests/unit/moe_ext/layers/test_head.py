"""The chunked output layer against torch's cross-entropy of all logits at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moe_ext.layers import head
from moe_ext.layers.head import VocabularyPart, linear_cross_entropy, tokens_per_chunk

TOKENS, WIDTH, ROWS, REAL = 13, 7, 24, 19


@pytest.fixture(params=[2**25, 3 * ROWS], ids=["one chunk", "chunks of 3"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._CHUNK_NUMBERS, "cpu", request.param)
    monkeypatch.setattr(head, "_BLOCK_NUMBERS", 5 * TOKENS)  # and passes over some columns


@pytest.fixture
def part(single_rank: ProcessGroupCollection) -> VocabularyPart:
    return VocabularyPart(first=0, number=REAL, num_token_ids=REAL, group=single_rank.tp)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels, and weights of the tokens, two of them zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(REAL, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    mask[[0, 5]] = 0.0
    return (
        hidden.to(dtype),
        weight.to(dtype),
        labels,
        mask.to(torch.promote_types(dtype, mask.dtype)),
    )


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight[:REAL].T, labels, reduction="none")


def with_gradients(
    compute: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = compute(*leaves)
    losses.backward(upstream)
    return losses, *(leaf.grad for leaf in leaves if leaf.grad is not None)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("has_weights", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(
    part: VocabularyPart, has_weights: bool
) -> None:
    hidden, weight, labels, mask = problem()
    upstream = -2.5 * mask
    if not has_weights:  # no multiple of anything it could have been told
        upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1)).double()
    actual = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, mask if has_weights else None, part=part),
        hidden,
        weight,
        upstream,
    )
    expected = with_gradients(lambda x, w: plain(x, w, labels), hidden, weight, upstream)
    assert len(actual) == 3
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not actual[2][REAL:].any()  # padding rows learn nothing


def test_large_logits_neither_overflow_nor_lose_a_loss(part: VocabularyPart) -> None:
    hidden, weight, labels, mask = problem()
    hidden = hidden * 300
    losses = linear_cross_entropy(hidden, weight, labels, mask, part=part)
    torch.testing.assert_close(losses, plain(hidden, weight, labels), rtol=1e-13, atol=1e-12)
    assert losses.max() > 710  # exp would overflow or vanish


@pytest.mark.usefixtures("chunked")
def test_bf16_losses_are_near_those_of_float64(part: VocabularyPart) -> None:
    hidden, weight, labels, _ = problem(torch.bfloat16)
    mask = torch.ones(TOKENS)
    actual = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, mask, part=part), hidden, weight, mask
    )
    expected = with_gradients(
        lambda x, w: plain(x, w, labels), hidden.double(), weight.double(), mask.double()
    )
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b in zip(actual, expected, strict=True):
        # Products of bf16 may round logits to 8 bits, results are rounded so in any case.
        torch.testing.assert_close(a.double(), b, rtol=3e-2, atol=3e-2)


def test_a_buffer_is_added_to_and_the_weight_marked(part: VocabularyPart) -> None:
    hidden, weight, labels, mask = problem(torch.float32)
    (_, _, expected) = with_gradients(
        lambda x, w: plain(x, w, labels), hidden, weight, mask.float()
    )
    for told in (mask.float(), None):
        parameter = torch.nn.Parameter(weight.clone())
        parameter.main_grad = torch.full_like(weight, 3.0)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        losses = linear_cross_entropy(hidden, parameter, labels, told, part=part)
        losses.backward(mask.float())
        assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        found = parameter.main_grad - 3.0  # type: ignore[attr-defined]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_no_multiple_of_the_weights_are_refused(part: VocabularyPart) -> None:
    hidden, weight, labels, mask = problem()
    losses = linear_cross_entropy(hidden, weight.requires_grad_(), labels, mask, part=part)
    with pytest.raises(ValueError, match="no multiple of the token weights"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float16])
def test_a_mask_may_have_any_dtype(part: VocabularyPart, dtype: torch.dtype) -> None:
    hidden, weight, labels, mask = problem(torch.float32)
    mask = (mask > 0.3).to(dtype)
    upstream = mask.float() * 0.3
    actual = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, mask, part=part), hidden, weight, upstream
    )
    expected = with_gradients(lambda x, w: plain(x, w, labels), hidden, weight, upstream)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_gradients_none_is_computed(
    part: VocabularyPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels, mask = problem()

    def refuse(*_: object) -> None:
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(head._Head, "_add_gradients", refuse)
    weight.requires_grad_()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, labels, mask, part=part)
    torch.testing.assert_close(losses, plain(hidden, weight.detach(), labels))


def test_a_label_that_is_no_token_has_an_infinite_loss_unless_it_is_not_counted(
    part: VocabularyPart,
) -> None:
    hidden, weight, labels, mask = problem()
    labels[[0, 1, 2]] = torch.tensor([-100, REAL, ROWS])  # of the three the first is not counted
    losses = linear_cross_entropy(hidden, weight, labels, mask, part=part)
    assert losses.isinf().tolist() == [False, True, True] + [False] * (TOKENS - 3)
    untold = linear_cross_entropy(hidden, weight, labels, None, part=part)
    assert untold.isinf().tolist() == [True] * 3 + [False] * (TOKENS - 3)


def test_no_token_counted_gives_zero_gradients(part: VocabularyPart) -> None:
    hidden, weight, labels, mask = problem()
    zeros = torch.zeros_like(mask)
    _, *gradients = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, zeros, part=part), hidden, weight, zeros
    )
    assert len(gradients) == 2 and not any(gradient.any() for gradient in gradients)


def test_no_token_at_all_gives_no_loss(part: VocabularyPart) -> None:
    hidden, weight, labels, mask = (tensor[:0] for tensor in problem())
    losses, grad, _ = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels, mask, part=part), hidden, problem()[1], mask
    )
    assert losses.shape == (0,) and grad.shape == (0, WIDTH)
    assert weight.shape == (0, WIDTH)


def test_chunks_are_as_few_as_their_size_allows() -> None:
    assert tokens_per_chunk(2048, 50304, "cpu") == 2048 // 4
    assert tokens_per_chunk(100, 50304, "cpu") == 100
    assert tokens_per_chunk(5, 10**9, "cpu") == 1
    assert tokens_per_chunk(0, 128, "cuda") == 1
