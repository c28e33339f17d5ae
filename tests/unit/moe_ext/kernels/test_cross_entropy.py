"""The softmax kernels against float64, alone and in the head; in triton's interpreter, or on a GPU.

tests/conftest.py asks for the interpreter where there is no GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_ext.kernels import cross_entropy, fused, triton_jit
from moe_ext.kernels.cross_entropy import softmax_gradient_, softmax_statistics
from moe_ext.layers import head
from moe_ext.layers.head import VocabularyPart, linear_cross_entropy

pytest.importorskip("triton", reason="triton has no wheel for this platform")

DEVICE = "cpu" if triton_jit.IS_INTERPRETED else "cuda"
# fp32: a few roundings of numbers below one. bf16: the gradient's own rounding; the interpreter
# cuts off, so 2^-7 of numbers below one.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
ROWS, COLUMNS = 6, 37
# Two of no column here, as on the other ranks of a vocabulary; one of a row without weight.
LABELS, WEIGHTS = [0, 36, -1, 37, 5, 5], [1.0, 0.5, 0.25, -2.0, 0.0, 1.5]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK", 16)  # and 37 columns make three


def problem(dtype: torch.dtype, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, weights."""
    logits = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0)) * 4
    return (
        logits.to(DEVICE, dtype),
        torch.tensor(LABELS, device=DEVICE),
        torch.tensor(WEIGHTS, device=DEVICE),
    )


def truth(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp, the labels' logits, and the gradient of the weighted losses, in float64."""
    wide = logits.double().requires_grad_()
    is_here = (labels >= 0) & (labels < logits.shape[1])
    target = wide.gather(1, labels.where(is_here, 0)[:, None]).squeeze(1) * is_here
    normalizer = wide.logsumexp(1)
    ((normalizer - target) * weights).sum().backward()
    assert wide.grad is not None
    return normalizer.detach(), target.detach(), wide.grad


@pytest.mark.parametrize("columns", [1, 16, COLUMNS, 48])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_statistics_and_gradient_are_those_of_float64(dtype: torch.dtype, columns: int) -> None:
    logits, labels, weights = problem(dtype, columns)
    normalizer, target, gradient = truth(logits, labels, weights)
    untouched = logits.clone()
    softmax_statistics(untouched, labels, None)
    assert torch.equal(untouched, logits)
    largest, total, found = softmax_statistics(logits, labels, weights)
    assert torch.equal(largest, untouched.float().amax(1)) and torch.equal(found.double(), target)
    torch.testing.assert_close(
        largest.double() + total.double().log(), normalizer, rtol=0, atol=2e-6
    )
    assert (logits.double() - gradient).abs().max() <= LIMITS[dtype] * weights.abs().max()
    assert not logits[4].any()  # has no weight


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_parts_of_a_vocabulary_make_the_whole(dtype: torch.dtype) -> None:
    logits, labels, weights = problem(dtype)
    whole = logits.clone()
    largest, total, _ = softmax_statistics(whole, labels, weights)
    for first, last in ((0, 20), (20, COLUMNS)):
        own = logits[:, first:last].contiguous()
        softmax_gradient_(own, labels - first, weights, largest, total)
        assert torch.equal(own, whole[:, first:last])


def test_two_runs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        logits, labels, weights = problem(torch.bfloat16)
        runs.append((*softmax_statistics(logits, labels, weights), logits))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# numpy, which is the interpreter's arithmetic, warns of these.
@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")
def test_extreme_logits_neither_overflow_nor_hide_what_is_no_number() -> None:
    logits, labels, weights = problem(torch.float32)
    logits *= 1000
    logits[1, :20] = -torch.inf  # a whole block, and part of the next
    logits[2, 3] = torch.nan
    logits[3, 30] = torch.inf
    normalizer, _, gradient = truth(logits, labels, weights)
    largest, total, _ = softmax_statistics(logits, labels, weights)
    fine = torch.tensor([True, True, False, False, True, True])
    actual = largest.double() + total.double().log()
    torch.testing.assert_close(actual[fine], normalizer[fine], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double()[fine], gradient[fine], rtol=0, atol=1e-6)
    assert total[~fine].isnan().all()  # for the trainer to find in the loss


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "statistics_kernel", None)
    monkeypatch.setattr(cross_entropy, "gradient_kernel", None)
    none = torch.zeros(0, device=DEVICE)
    parts = softmax_statistics(none.view(0, 5), none.long(), none)
    assert [len(each) for each in parts] == [0, 0, 0]
    softmax_gradient_(none.view(0, 5), none.long(), none, none, none)


def test_operands_that_do_not_fit_are_refused() -> None:
    logits, labels, weights = problem(torch.float32)
    with pytest.raises(ValueError, match=r"logits are \(37, 6\), \(1, 37\); give \[c, v\], dense"):
        softmax_statistics(logits.T, labels, weights)
    with pytest.raises(ValueError, match=r"\(5,\) for 6 rows; give one number each"):
        softmax_statistics(logits, labels[:5], weights)


class Group:
    """Stands in for the ranks of a vocabulary of which this one has a part."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Have kernels take what a GPU would let them, and note which of the two ran."""
    monkeypatch.setattr(fused, "takes", lambda setting, *_: setting == "auto")
    names: list[str] = []
    for name in ("softmax_statistics", "softmax_gradient_"):
        function = getattr(cross_entropy, name)

        def noted(*args: Any, name: str = name, function: Any = function) -> Any:
            names.append(name)
            return function(*args)

        monkeypatch.setattr(cross_entropy, name, noted)
    yield names


def head_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight with padding rows, labels, and weights of tokens, one of them zero."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(24, 5, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(19, (7,), generator=generator).to(DEVICE)
    mask = torch.rand(7, generator=generator).to(DEVICE)
    mask[0] = 0.0
    return hidden, weight, labels, mask


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_head_makes_the_losses_and_gradients_of_all_logits(
    dtype: torch.dtype, is_told: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head._CHUNK_NUMBERS, DEVICE, 3 * 24)
    hidden, weight, labels, mask = head_problem(dtype)
    labels[0] = -100  # not counted
    part: Any = VocabularyPart(first=0, number=19, num_token_ids=19, group=Group(1))  # type: ignore[arg-type]
    results = []
    for each in (hidden, weight), (hidden.double(), weight.double()):
        x, w = (tensor.clone().requires_grad_() for tensor in each)
        if each[0] is hidden:
            told = mask if is_told else None
            losses = linear_cross_entropy(x, w, labels, told, part=part)
        else:
            logits = x @ w[:19].T
            losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        upstream = (2.5 * mask).to(losses.dtype)
        losses[1:].backward(upstream[1:])
        results.append((losses[1:], x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        limit = 2e-6 if dtype == torch.float32 else 4 * 2.0**-7  # logits, gradient, result
        assert a is not None and b is not None
        assert (a.double() - b).norm() <= limit * b.norm()
    assert results[0][2] is not None and not results[0][2][19:].any()
    assert launched == ["softmax_statistics"] * (3 if is_told else 6)


@pytest.mark.usefixtures("launched")
def test_the_gradient_of_a_sum_is_taken_as_it_comes() -> None:
    hidden, weight, labels, _ = head_problem(torch.float32)
    part = VocabularyPart(first=0, number=19, num_token_ids=19, group=Group(1))  # type: ignore[arg-type]
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, None, part=part).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight[:19].double().T, labels, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, exact.grad.float())  # type: ignore[union-attr]


def test_a_rank_with_part_of_the_vocabulary_makes_its_part(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels, mask = head_problem(torch.float32)
    others = (hidden @ weight[10:19].T).double()  # of the other rank
    own = (hidden @ weight[:10].T).double()
    largest = torch.maximum(others.amax(1), own.amax(1))
    is_theirs = labels >= 10
    target = others.gather(1, (labels - 10).clamp(min=0)[:, None]).squeeze(1) * is_theirs

    def reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op == dist.ReduceOp.MAX:
            tensor.copy_(torch.maximum(tensor, others.amax(1)))
        else:
            tensor += torch.stack([(others - largest[:, None]).exp().sum(1), target])

    monkeypatch.setattr(dist, "all_reduce", reduce)
    part = VocabularyPart(first=0, number=10, num_token_ids=19, group=Group(2))  # type: ignore[arg-type]
    x, w = hidden.clone().requires_grad_(), weight[:10].clone().requires_grad_()
    losses = linear_cross_entropy(x, w, labels, mask, part=part)
    losses.backward(mask)
    logits = torch.cat([own, others], dim=1)
    expected = F.cross_entropy(logits, labels, reduction="none")
    gradient = logits.softmax(1)
    gradient[torch.arange(7), labels] -= 1.0
    gradient = (gradient * mask[:, None])[:, :10]
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, (gradient @ weight[:10].double()).float())
    torch.testing.assert_close(w.grad, (gradient.T @ hidden.double()).float())
    assert launched == ["softmax_statistics", "softmax_gradient_"]


def test_switched_off_no_kernel_computes(launched: list[str]) -> None:
    hidden, weight, labels, mask = head_problem(torch.float32)
    part = VocabularyPart(first=0, number=19, num_token_ids=19, group=Group(1))  # type: ignore[arg-type]
    linear_cross_entropy(hidden, weight, labels, mask, part=part, fused_kernels="off")
    assert launched == []
    linear_cross_entropy(hidden, weight, labels, mask, part=part)
    assert launched == ["softmax_statistics"]
