"""The kernels of RMSNorm and SwiGLU against float64; in triton's interpreter, or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.kernels import gated_unit as gated_unit_module
from moe_ext.kernels import rms_norm as rms_norm_module
from moe_ext.kernels import rotated_norm as rotated_norm_module
from moe_ext.kernels import routed_unit as routed_unit_module
from moe_ext.kernels import triton_jit
from moe_ext.kernels.gated_unit import gated_unit
from moe_ext.kernels.rms_norm import lines_of, rms_norm
from moe_ext.kernels.rotated_norm import rotated_norm
from moe_ext.kernels.routed_unit import routed_unit, routed_unit_gradient
from moe_ext.layers.rotary import RotaryAngles

pytest.importorskip("triton", reason="triton has no wheel for this platform")

DEVICE = "cpu" if triton_jit.IS_INTERPRETED else "cuda"
# fp32: sums of at most 40 terms. bf16: at most three roundings, 2^-7 each: the interpreter cuts.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 3 * 2.0**-7}
EPS = 1e-3


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows a program, several programs, and several blocks of rows or columns in each."""
    monkeypatch.setattr(rms_norm_module, "_TILE", 32)
    monkeypatch.setattr(rms_norm_module, "PARTS", 3)
    monkeypatch.setattr(rotated_norm_module, "PARTS", 3)
    monkeypatch.setattr(gated_unit_module, "_BLOCK", 16)
    monkeypatch.setattr(routed_unit_module, "_BLOCK", 16)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).requires_grad_()


def formula(hidden: Tensor, weight: Tensor) -> Tensor:
    rows = hidden.reshape(*hidden.shape[: hidden.dim() - 1 - (len(weight) != hidden.shape[-1])], -1)
    normed = rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return normed.view(hidden.shape)


def swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


def compare(
    actual: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Compare output and gradients by norm; the upstream gradient is what both dtypes can hold."""
    output = actual(*inputs)
    upstream = random(*output.shape, dtype=output.dtype, seed=9).detach()
    found = [output, *torch.autograd.grad(output, inputs, upstream)]
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    truth = exact(*doubles)
    expected = [truth, *torch.autograd.grad(truth, doubles, upstream.double())]
    again = actual(*inputs)
    repeated = [again, *torch.autograd.grad(again, inputs, upstream)]
    for a, b, c in zip(found, expected, repeated, strict=True):
        assert a.shape == b.shape and a.dtype == inputs[0].dtype
        assert (a.double() - b).norm() <= LIMITS[inputs[0].dtype] * b.norm()
        assert torch.equal(a, c)  # two runs give the same bits


@pytest.mark.parametrize("shape", [(5, 37), (2, 10, 8), (3, 32), (1, 3)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_norm_and_its_gradients_are_those_of_float64(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)]
    compare(lambda x, w: rms_norm(x, w, EPS), formula, inputs)


def heads_between(dtype: torch.dtype) -> Tensor:
    """Make keys [s, b, 3, 4], each head between a query's and a value's."""
    return random(5, 2, 3, 12, dtype=dtype).detach().split(4, dim=-1)[1].requires_grad_()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_heads_are_normalised_together_where_they_lie(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [heads_between(dtype), random(12, dtype=dtype, seed=1)]
    assert not inputs[0].is_contiguous()
    places: list[int] = []
    kernel = rms_norm_module.rms_norm_kernel

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            def launch(hidden: Tensor, *others: Any, **constants: Any) -> None:
                places.append(hidden.data_ptr())
                kernel[grid](hidden, *others, **constants)

            return launch

    monkeypatch.setattr(rms_norm_module, "rms_norm_kernel", Noted())
    compare(lambda x, w: rms_norm(x, w, EPS), formula, inputs)
    assert set(places) == {inputs[0].data_ptr()}


@pytest.mark.parametrize(
    ("batch", "starts", "head_size"), [(2, [0], 8), (2, [3, 0], 6), (1, [5], 4)], ids=str
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_heads_are_normalised_and_rotated(
    dtype: torch.dtype, batch: int, starts: list[int], head_size: int
) -> None:
    heads = random(5, batch, 3, 3 * head_size, dtype=dtype).detach().split(head_size, dim=-1)[1]
    weight = random(3 * head_size, dtype=dtype, seed=1)
    positions = torch.tensor(starts)[:, None] + torch.arange(5)  # each row's, or one for all
    angles = RotaryAngles(head_size, base=100.0)(positions.to(DEVICE))

    def exact(heads: Tensor, weight: Tensor) -> Tensor:
        normed = formula(heads, weight)
        first, second = normed.chunk(2, dim=-1)
        cos, sin = (each.to(dtype).double() for each in (angles.cos(), angles.sin()))
        return normed * cos + torch.cat((-second, first), dim=-1) * sin

    compare(lambda x, w: rotated_norm(x, w, angles, EPS), exact, [heads.requires_grad_(), weight])


def test_rows_are_found_by_their_strides_or_copied() -> None:
    whole = torch.zeros(4, 3, 6)
    assert lines_of(whole, 6) == (6, 6, 6) and lines_of(whole, 18) == (18, 6, 6)
    assert lines_of(whole[..., :2], 2) == (6, 2, 2) and lines_of(whole[..., :2], 6) == (18, 2, 6)
    assert lines_of(whole[:, :2], 6) is None and lines_of(whole.mT, 3) is None
    # The stride of a dimension of one element means nothing.
    assert lines_of(whole[:, :1], 6) == (18, 6, 6)
    assert lines_of(torch.zeros(6), 6) == (6, 6, 6)
    for strided in (random(3, 4, 6, dtype=torch.float32)[:, :2], torch.ones(6, 5).T):
        weight = random(strided.shape[-1], dtype=torch.float32)
        compare(
            lambda x, w: rms_norm(x, w, EPS), formula, [strided.detach().requires_grad_(), weight]
        )


@pytest.mark.parametrize("shape", [(5, 2 * 37), (2, 3, 2 * 16), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_swiglu_and_its_gradient_are_those_of_float64(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    compare(gated_unit, swiglu, [random(*shape, dtype=dtype)])


@pytest.mark.parametrize("shape", [(5, 2 * 37), (6, 2 * 16), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_swiglu_of_routed_rows_and_its_gradients_are_those_of_float64(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    projected, probs = random(*shape, dtype=dtype), random(shape[0], dtype=torch.float32, seed=1)
    grad = random(shape[0], shape[1] // 2, dtype=dtype, seed=2).detach()
    exact = [each.detach().double().requires_grad_() for each in (projected, probs)]
    output = swiglu(exact[0]) * exact[1][:, None]
    gradients = torch.autograd.grad(output, exact, grad.double())
    found = [
        routed_unit(projected.detach(), probs.detach()),
        *routed_unit_gradient(grad, projected.detach(), probs.detach()),
    ]
    again = routed_unit_gradient(grad, projected.detach(), probs.detach())
    for a, b in zip(found, [output, *gradients, output], strict=True):
        assert a.shape == b.shape and (a.double() - b).norm() <= LIMITS[dtype] * b.norm()
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, dtype]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))


def test_no_rows_launch_nothing_and_give_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (rms_norm_module, "rms_norm"),
        (gated_unit_module, "gated_unit"),
        (routed_unit_module, "routed_unit"),
    ):
        monkeypatch.setattr(module, f"{name}_kernel", None)
        monkeypatch.setattr(module, f"{name}_gradient_kernel", None)
    none, weight = random(0, 2, 6, dtype=torch.bfloat16), random(6, dtype=torch.bfloat16)
    output = rms_norm(none, weight, EPS)
    gradients = torch.autograd.grad(output.sum(), [none, weight])
    assert output.shape == gradients[0].shape == (0, 2, 6) and not gradients[1].any()
    product = gated_unit(none)
    assert product.shape == (0, 2, 3)
    assert torch.autograd.grad(product.sum(), none)[0].shape == none.shape
    rows, probs = none.detach().view(0, 6), torch.zeros(0, device=DEVICE)
    assert routed_unit(rows, probs).shape == (0, 3)
    shapes = [each.shape for each in routed_unit_gradient(rows[:, :3], rows, probs)]
    assert shapes == [(0, 6), (0,), (0, 3)]


def test_what_does_not_fit_is_refused() -> None:
    hidden = torch.ones(2, 6)
    for weight in (torch.ones(5), torch.ones(6).bfloat16()):
        with pytest.raises(ValueError, match=r"hidden is \(2, 6\) of torch.float32 and weight"):
            rms_norm(hidden, weight, EPS)
    with pytest.raises(ValueError, match="at most 8192"):
        rms_norm(torch.ones(1, 8193), torch.ones(8193), EPS)
    with pytest.raises(ValueError, match=r"angles \(3, 1, 1, 4\) do not fit"):
        rotated_norm(torch.ones(2, 1, 3, 4), torch.ones(12), torch.ones(3, 1, 1, 4), EPS)
    with pytest.raises(ValueError, match=r"projected is \(2, 5\); give as many gates as ups"):
        gated_unit(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"projected \(2, 6\), probs \(3,\) and gradient None"):
        routed_unit(torch.ones(2, 6), torch.ones(3))
    with pytest.raises(ValueError, match=r"gradient \(2, 6\) do not fit"):
        routed_unit_gradient(torch.ones(2, 6), torch.ones(2, 6), torch.ones(2))
