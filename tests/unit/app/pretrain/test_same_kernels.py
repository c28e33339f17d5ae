"""A run asks whether its ranks compute with the same kernels; what they answer: test_collective."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron.trainer.state import TrainState
from moe_app.pretrain import build


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [({}, "loop"), ({"num_experts": "None", "ffn_hidden_size": 40}, None)],
    ids=["experts", "dense"],
)
def test_a_run_asks_about_what_it_computes_with(
    monkeypatch: pytest.MonkeyPatch,
    make_state: Callable[..., TrainState],
    overrides: dict[str, Any],
    backend: str | None,
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(build, "agree_on_kernels", lambda **settings: asked.append(settings))
    make_state(expert_backend="loop", fused_kernels="off", **overrides)
    assert asked == [{"backend": backend, "fused_kernels": "off", "device_type": "cpu"}]
