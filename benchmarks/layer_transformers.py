"""Implements layers of transformers under a given routing."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer_problem import LayerProblem, LayerSubject, grad_of
from benchmarks.shapes import Shape
from moe_ext.convert import FAMILIES


def hf_config(shape: Shape, dtype: torch.dtype, *, experts: str = "eager") -> Any:
    """Build the config object of the shape's model.

    Args:
        shape: its router and attention determine the family.
        dtype: of the weights.
        experts: implementation of OLMoE's experts; transformers has one of JetMoE's.
    """
    from transformers import AutoConfig

    fields = FAMILIES[family_name(shape)].hf_config(
        shape.model,
        max_position_embeddings=shape.seq_length,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,  # transformers gives a padding token's embedding no gradient
    )
    config = AutoConfig.for_model(**fields)
    config._attn_implementation = "sdpa"
    if family_name(shape) == "olmoe":
        config._experts_implementation = experts
    return config


def family_name(shape: Shape) -> str:
    """Return the key of the shape's model in moe_ext.convert.FAMILIES."""
    return "jetmoe" if shape.model.attention_experts is not None else "olmoe"


class SortedRouting(nn.Module):
    """Replaces JetMoE's router and returns its outputs for a given routing.

    Args:
        experts: [t, k].
        gates: [t, k].
        num_experts: e.
    """

    def __init__(self, experts: Tensor, gates: Tensor, num_experts: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(gates.clone())
        self._experts, self._num_experts = experts, num_experts

    def take(self, experts: Tensor, gates: Tensor) -> None:
        """Use another routing of as many tokens."""
        self._experts = experts
        self.gates.copy_(gates)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        """Return sorted slots, their tokens, their gates and tokens per expert; no logits."""
        owners = self._experts.flatten()
        order = owners.sort(stable=True).indices
        sizes: list[int] = owners.bincount(minlength=self._num_experts).tolist()
        gates = self.gates.to(hidden.dtype).flatten()[order]
        return order, order // self._experts.shape[1], gates, sizes, self.gates


class OlmoeLayer(LayerSubject):
    """Runs OlmoeExperts.

    Args:
        problem: inputs and weights.
        implementation: "eager" or "grouped_mm".
    """

    def __init__(self, problem: LayerProblem, implementation: str) -> None:
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        super().__init__(problem)
        config = hf_config(problem.shape, problem.dtype, experts=implementation)
        with problem.device:
            self._layer = OlmoeExperts(config).to(problem.dtype)
        weight1, weight2 = problem.expert_weights()
        with torch.no_grad():
            self._layer.gate_up_proj.copy_(weight1)
            self._layer.down_proj.copy_(weight2)
        self._gates = problem.routing.gates.clone().requires_grad_()

    def take_routing(self) -> None:
        """See `LayerSubject`; the experts are read in `forward`."""
        self._gates.copy_(self.problem.routing.gates)

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        rows = self.hidden.flatten(0, 1)  # [t, h]
        gates = self._gates.to(rows.dtype)
        output: Tensor = self._layer(rows, self.problem.routing.experts, gates)
        return output.view_as(self.hidden)

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters and gates."""
        yield from self._layer.parameters()
        yield self._gates

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        return {
            "gates": grad_of(self._gates),
            "weight1": grad_of(self._layer.gate_up_proj),
            "weight2": grad_of(self._layer.down_proj),
        }


class JetMoeLayer(LayerSubject):
    """Runs JetMoeMoE without its bias, which the other layers here lack.

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE

        super().__init__(problem)
        routing = problem.routing
        with problem.device:
            self._layer = JetMoeMoE(hf_config(problem.shape, problem.dtype)).to(problem.dtype)
        self._router = SortedRouting(
            routing.experts, routing.gates, problem.shape.model.num_experts or 0
        )
        self._layer.router = self._router  # type: ignore[assignment]
        weight1, weight2 = problem.expert_weights()
        with torch.no_grad():
            self._layer.input_linear.weight.copy_(weight1)
            self._layer.output_linear.weight.copy_(weight2)
            self._layer.bias.zero_().requires_grad_(False)

    def take_routing(self) -> None:
        """See `LayerSubject`."""
        self._router.take(self.problem.routing.experts, self.problem.routing.gates)

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        output: Tensor = self._layer(self.hidden)
        return output

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters, including the gates."""
        yield from self._layer.parameters()

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        return {
            "gates": grad_of(self._router.gates),
            "weight1": grad_of(self._layer.input_linear.weight),
            "weight2": grad_of(self._layer.output_linear.weight),
        }


class JetMoeAttentionLayer(LayerSubject):
    """Runs JetMoeAttention through SDPA; it takes [b, s, h].

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        from transformers.models.jetmoe.modeling_jetmoe import (
            JetMoeAttention,
            JetMoeRotaryEmbedding,
        )

        super().__init__(problem)
        shape, routing = problem.shape, problem.routing
        config = hf_config(shape, problem.dtype)
        with problem.device:
            self._layer = JetMoeAttention(config, layer_idx=0).to(problem.dtype)
            positions = torch.arange(shape.seq_length)[None]
            self._angles = JetMoeRotaryEmbedding(config)(self.hidden, positions)
        self._router = SortedRouting(
            self._rows(routing.experts), self._rows(routing.gates), shape.model.num_experts or 0
        )
        self._layer.experts.router = self._router  # type: ignore[assignment]
        weights = problem.attention_weights()
        with torch.no_grad():
            self._layer.experts.input_linear.weight.copy_(weights["q"])
            self._layer.experts.output_linear.weight.copy_(weights["o"])
            self._layer.kv_proj.weight.copy_(torch.cat((weights["k"], weights["v"])))
            self._layer.experts.bias.zero_()

    def arrange(self, rows: Tensor) -> Tensor:
        """See `LayerSubject`."""
        return batch_first(rows)

    def take_routing(self) -> None:
        """See `LayerSubject`."""
        routing = self.problem.routing
        self._router.take(self._rows(routing.experts), self._rows(routing.gates))

    def _rows(self, of_tokens: Tensor) -> Tensor:
        """Reorder [t, k] from [s, b] tokens to [b, s] tokens."""
        sizes = (self.problem.shape.seq_length, self.problem.shape.micro_batch_size)
        return of_tokens.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)

    def forward(self) -> Tensor:
        """Compute the output [b, s, h]."""
        output: Tensor = self._layer(
            self.hidden, attention_mask=None, position_embeddings=self._angles
        )[0]
        return output

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters, including the gates."""
        yield from self._layer.parameters()

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        experts = self._layer.experts
        sizes = (self.problem.shape.micro_batch_size, self.problem.shape.seq_length)
        by_sample = grad_of(self._router.gates).unflatten(0, sizes)
        key, value = grad_of(self._layer.kv_proj.weight).chunk(2)
        return {
            "hidden": grad_of(self.hidden).transpose(0, 1),
            "gates": by_sample.transpose(0, 1).flatten(0, 1),
            "q": grad_of(experts.input_linear.weight),
            "o": grad_of(experts.output_linear.weight),
            "k": key,
            "v": value,
            "bias": grad_of(experts.bias),
        }


def load() -> None:
    """Import in advance what transformers imports lazily."""
    from transformers.models.jetmoe import modeling_jetmoe
    from transformers.models.olmoe import modeling_olmoe

    assert modeling_jetmoe and modeling_olmoe


def batch_first(tensor: Tensor) -> Tensor:
    """Transpose [s, b, h] to a contiguous, detached [b, s, h]."""
    return tensor.detach().transpose(0, 1).contiguous()


def build_experts(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype, implementation: str
) -> LayerSubject:
    """Build the layer in a worker."""
    problem = LayerProblem(shape, routing, device, dtype)
    if family_name(shape) == "jetmoe":
        return JetMoeLayer(problem)
    return OlmoeLayer(problem, implementation)


def build_moa(device: torch.device, shape: Shape, routing: str, dtype: torch.dtype) -> LayerSubject:
    """Build the layer in a worker."""
    return JetMoeAttentionLayer(LayerProblem(shape, routing, device, dtype))
