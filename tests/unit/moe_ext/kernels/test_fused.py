"""Where fused kernels are taken, and what is said of it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_ext.config import MoEModelConfig
from moe_ext.kernels import fused, trial, triton_jit
from moe_ext.layers.transformer import transformer_config


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    fused._problem.cache_clear()
    yield
    fused._problem.cache_clear()


def operand(dtype: torch.dtype, *, is_cuda: bool = True) -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have a GPU, as far as it is asked for."""
    monkeypatch.setattr(triton_jit, "is_available", lambda: (True, "compiled"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(trial, "find_problem", lambda device: None)
    return monkeypatch


def test_they_take_bf16_and_fp32_on_a_gpu_and_nothing_else(hopper: pytest.MonkeyPatch) -> None:
    bf16, fp32 = operand(torch.bfloat16), operand(torch.float32)
    assert fused.takes("auto", bf16) and fused.takes("auto", bf16, fp32)
    assert not fused.takes("off", bf16)
    assert not fused.takes("auto", bf16, operand(torch.float64))
    assert not fused.takes("auto", operand(torch.bfloat16, is_cuda=False))
    assert not fused.takes("auto", torch.zeros(2))
    assert fused.describe("auto", "cuda") == "fused kernels: where they can"
    fused._problem.cache_clear()
    hopper.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not fused.takes("auto", bf16)
    told = "fused kernels: none, they need compute capability 8.0, and the GPU has 7.5"
    assert fused.describe("auto", "cuda") == told


def test_what_prevents_them_is_named(hopper: pytest.MonkeyPatch) -> None:
    assert fused.describe("off", "cuda") == "fused kernels: none, fused_kernels is 'off'"
    assert fused.describe("auto", "cpu") == ("fused kernels: none, they need a GPU and this is cpu")
    hopper.setattr(triton_jit, "is_available", lambda: (False, "triton is not installed"))
    assert fused.describe("auto", "cuda") == "fused kernels: none, triton is not installed"
    assert not fused.takes("auto", operand(torch.bfloat16))


def test_a_kernel_that_fails_its_trial_is_named_and_none_is_taken(
    hopper: pytest.MonkeyPatch,
) -> None:
    hopper.setattr(trial, "find_problem", lambda device: f"that of RMSNorm is off on {device}")
    assert not fused.takes("auto", operand(torch.bfloat16))
    assert fused.describe("auto", "cuda") == "fused kernels: none, that of RMSNorm is off on cuda"


def test_the_trial_passes_kernels_and_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert trial.find_problem(cpu) is None
    right = trial.gated_unit
    monkeypatch.setattr(trial, "gated_unit", lambda projected: right(projected) * 1.05)
    told = trial.find_problem(cpu)
    assert told is not None and told.startswith("that of SwiGLU is 0.0")
    monkeypatch.setattr(trial, "gated_unit", right)
    monkeypatch.setattr(trial, "rms_norm", lambda *inputs: inputs[0] * inputs[9])
    told = trial.find_problem(cpu)
    assert told is not None and told.startswith("that of RMSNorm fails here (IndexError")
    monkeypatch.setattr(trial, "softmax_gradient_", lambda *inputs: None)
    told = trial.find_problem(cpu)
    assert told is not None and told.startswith("that of cross-entropy is ")


def test_the_model_says_it_to_every_layer() -> None:
    for setting in ("auto", "off"):
        model = MoEModelConfig(fused_kernels=setting)
        assert fused.setting_of(transformer_config(model, bf16=True)) == setting
        assert "fused_kernels" not in model.architecture()
    assert fused.setting_of(object()) == "auto"
