"""Puts stand-ins for Liger's modules into the peer, which then has to compute as transformers does.

The wheel's own kernels need a GPU; there the session compares loss and gradients before it times.
"""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.olmoe import modeling_olmoe

from benchmarks import step_liger, train_step
from benchmarks.shapes import SHAPES
from benchmarks.step_peers import TransformersStep, make_batch

CPU, FP32 = torch.device("cpu"), torch.float32
SHAPE = dataclasses.replace(SHAPES["olmoe_toy"], seq_length=8, micro_batch_size=2)
used: list[str] = []


class Norm(modeling_olmoe.OlmoeRMSNorm):
    """LigerRMSNorm's arguments; it computes more exactly."""

    def forward(self, hidden: Tensor) -> Tensor:
        used.append("norm")
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class Experts(nn.Module):
    """LigerExperts' parameters and arguments; every expert computes every token."""

    def __init__(self, config: modeling_olmoe.OlmoeConfig) -> None:
        super().__init__()
        e, f, h = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, f))

    def forward(self, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        used.append("experts")
        gate, up = torch.einsum("th,efh->tef", hidden, self.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("tef,ehf->teh", F.silu(gate) * up, self.down_proj)
        weights = torch.zeros(outputs.shape[:2]).scatter(1, experts, gates)
        return (weights[..., None] * outputs).sum(dim=1)


class Loss(nn.Module):
    """The arguments of LigerFusedLinearCrossEntropyLoss."""

    def forward(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        used.append("loss")
        return F.cross_entropy(hidden @ weight.T, labels)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("liger_kernel.transformers")
    package.LigerRMSNorm = Norm  # type: ignore[attr-defined]
    package.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    swiglu = ModuleType("liger_kernel.transformers.swiglu")
    swiglu.LigerExperts = Experts  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), package, swiglu):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    used.clear()


@pytest.mark.usefixtures("stand_ins")
def test_the_peer_computes_what_transformers_does_through_every_replaced_module() -> None:
    peer = step_liger.LigerStep(SHAPE, CPU, FP32, has_master_weights=True)
    truth = TransformersStep(SHAPE, CPU, FP32, experts="eager", has_master_weights=True)
    batch = make_batch(SHAPE, 0, CPU)
    assert peer.loss_and_backward(batch) == pytest.approx(truth.loss_and_backward(batch), rel=1e-6)
    layers = SHAPE.model.num_layers
    assert sorted(used) == ["experts"] * layers + ["loss"] + ["norm"] * (4 * layers + 1)
    theirs = {(name, start): grad for name, start, grad in truth.gradient_parts()}
    for name, start, grad in peer.gradient_parts():
        # fp32 sums in another order.
        torch.testing.assert_close(grad, theirs.pop((name, start)), rtol=1e-4, atol=1e-7)
    assert not theirs
    # The optimizer's weights are those that the replaced modules compute with.
    before = peer.loss_and_backward(batch)
    peer.step(batch)
    assert peer.loss_and_backward(batch) < before - 1e-5


def test_modules_with_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Liger's module has the weights \{'weight': \(4,\)\}"):
        step_liger.with_parameters(Norm(4), Norm(5))


def test_the_peer_is_listed_for_olmoe_on_gpus() -> None:
    listed = train_step.entries(SHAPE, torch.bfloat16, "cuda")
    assert {"transformers-liger", "transformers-liger-autocast"} <= listed.keys()
    assert listed["transformers-liger"].package == "liger_kernel"
    assert not any("liger" in name for name in train_step.entries(SHAPE, FP32, "cpu"))
    jetmoe = train_step.entries(SHAPES["jetmoe_toy"], FP32, "cuda")
    assert not any("liger" in name for name in jetmoe)
    with pytest.raises(ValueError, match="run on GPUs, and the device is cpu"):
        step_liger.build(CPU, SHAPE, FP32, True)
