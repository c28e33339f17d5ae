"""Which backend `auto` takes, and what backends refuse."""

import dataclasses
import functools
import importlib.util

import pytest
import torch

from moe_ext.config import MoEModelConfig
from moe_ext.experts import (
    EXPERT_BACKENDS,
    Use,
    choose_backend,
    register_expert_backend,
    use_of_model,
)

ON_CPU = Use(device_type="cpu", dtype=torch.float32, widths=(32, 16))
ON_GPU = Use(device_type="cuda", dtype=torch.bfloat16, widths=(32, 16))


def test_auto_takes_the_grouped_backend_on_both_devices_and_says_why() -> None:
    for use, reason in ((ON_CPU, "the one made for CPUs"), (ON_GPU, "no other one has been")):
        choice = choose_backend("auto", use)
        assert choice.name == "grouped" and choice.reason.startswith(reason)


def test_auto_takes_triton_where_it_was_measured_to_be_fastest() -> None:
    can_run = dataclasses.replace(EXPERT_BACKENDS["triton"], problem=lambda _use: None)
    hopper = dataclasses.replace(ON_GPU, capability=(9, 0))
    others = [
        dataclasses.replace(ON_GPU, capability=(8, 0)),
        dataclasses.replace(ON_GPU, capability=(10, 0)),
        dataclasses.replace(hopper, dtype=torch.float32),
        ON_GPU,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERT_BACKENDS, "triton", can_run)
        choice = choose_backend("auto", hopper)
        assert choice.name == "triton" and choice.reason.startswith("measured on an H200")
        assert [choose_backend("auto", use).name for use in others] == ["grouped"] * 4
    missing = dataclasses.replace(can_run, problem=lambda _use: "is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERT_BACKENDS, "triton", missing)
        choice = choose_backend("auto", hopper)
        assert (choice.name, choice.reason) == ("grouped", "'triton' is not installed")


def test_auto_skips_what_cannot_take_the_sizes_and_says_so() -> None:
    odd = dataclasses.replace(ON_GPU, widths=(32, 20))
    choice = choose_backend("auto", odd)
    assert choice.name != "grouped"
    assert "'grouped' needs rows of a multiple of 8 numbers on a GPU" in choice.reason
    assert EXPERT_BACKENDS[choice.name].problem(odd) is None
    assert choose_backend("auto", dataclasses.replace(ON_CPU, widths=(5, 3))).name == "grouped"


def test_a_named_backend_is_taken_or_refused_never_replaced() -> None:
    assert choose_backend("loop", ON_GPU).name == "loop"
    odd = dataclasses.replace(ON_GPU, widths=(20,))
    with pytest.raises(ValueError, match=r"^expert_backend 'grouped' needs rows .* some of 20;"):
        choose_backend("grouped", odd)


def test_fused_kernels_are_left_out_of_the_backend_where_the_run_says_off() -> None:
    off = dataclasses.replace(ON_GPU, fused_kernels="off")
    for name in ("grouped", "auto"):
        assert choose_backend(name, ON_GPU).backend is EXPERT_BACKENDS["grouped"]
        without = choose_backend(name, off).backend
        assert without is EXPERT_BACKENDS["grouped"].without_kernels
    for function in (without.experts, without.fused_experts):
        assert isinstance(function, functools.partial)
        assert function.keywords == {"fused_kernels": "off"}
    assert choose_backend("loop", off).backend is EXPERT_BACKENDS["loop"]
    model = MoEModelConfig(fused_kernels="off")
    use = use_of_model(model, device_type="cpu", dtype=torch.float32, tensor=1, expert_tensor=1)
    assert use.fused_kernels == "off"


def test_auto_is_no_name_for_a_backend_and_is_among_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'auto' leaves the choice to the run"):
        register_expert_backend("auto", EXPERT_BACKENDS["loop"].experts)
    with pytest.raises(ValueError, match=r"unknown .* 'atuo'; known: auto, .* did you mean 'auto'"):
        choose_backend("atuo", ON_CPU)


@pytest.mark.parametrize(
    ("name", "use", "message"),
    [
        ("megablocks", ON_CPU, "computes bf16 on a GPU only; this is torch.float32 on cpu"),
        ("te", ON_CPU, "computes on a GPU, not on cpu"),
        (
            "megablocks",
            ON_GPU,
            r"needs megablocks and grouped_gemm: pip install --no-deps --no-build-isolation",
        ),
        ("te", ON_GPU, r"needs transformer_engine: pip install 'megatron-moe\[te"),
    ],
)
def test_what_is_not_there_names_what_to_install(
    name: str, use: Use, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=f"^expert_backend '{name}' {message}"):
        choose_backend(name, use)
