"""Implements layers with MegaBlocks and ScatterMoE under a given routing; needs a GPU."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer_problem import LayerProblem, LayerSubject, grad_of
from benchmarks.layer_transformers import batch_first
from benchmarks.shapes import Shape


class MegaBlocksLayer(LayerSubject):
    """Runs the experts of a dropless MoE of MegaBlocks.

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        from megablocks.layers.arguments import Arguments  # type: ignore[import-not-found]
        from megablocks.layers.dmoe import ParallelDroplessMLP  # type: ignore[import-not-found]

        super().__init__(problem)
        model = problem.shape.model
        self._layer = ParallelDroplessMLP(
            Arguments(
                hidden_size=model.hidden_size,
                ffn_hidden_size=model.moe_ffn_hidden_size,
                moe_num_experts=model.num_experts or 0,
                moe_top_k=model.moe_router_topk,
                moe_loss_weight=0.0,
                mlp_type="glu",
                mlp_impl="grouped",
                activation_fn=F.silu,
                bias=False,
                return_bias=False,
                fp16=False,
                bf16=problem.dtype == torch.bfloat16,
                device=problem.device,
            )
        )
        weight1, weight2 = problem.expert_weights()
        gate, up = weight1.chunk(2, dim=1)  # [e, f, h] each
        mine = self._layer.mlp
        with torch.no_grad():
            for weight, rows in ((mine.w1, gate), (mine.v1, up), (mine.w2, weight2.mT)):
                weight.copy_(rows.reshape(weight.shape))
        self._gates = torch.empty_like(problem.routing.gates, dtype=problem.dtype)
        self.take_routing()
        self._gates.requires_grad_()

    def take_routing(self) -> None:
        """See `LayerSubject`; the experts are read in `forward`."""
        routing = self.problem.routing
        self._gates.copy_(routing.gates)
        self._given: dict[str, Any] = {"scores": routing.scores.to(self.problem.dtype)}
        if "logits" in inspect.signature(self._layer.forward).parameters:
            self._given["logits"] = self._given["scores"]

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        output = self._layer(
            x=self.hidden,
            expert_weights=self._gates,
            top_experts=self.problem.routing.experts,
            **self._given,
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.view_as(self.hidden)

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters and gates."""
        yield from self._layer.parameters()
        yield self._gates

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        model, mine = self.problem.shape.model, self._layer.mlp
        by_expert = (model.num_experts or 0, model.moe_ffn_hidden_size, model.hidden_size)
        gate, up, down = (grad_of(w).view(by_expert) for w in (mine.w1, mine.v1, mine.w2))
        return {
            "gates": grad_of(self._gates),
            "weight1": torch.cat((gate, up), dim=1),
            "weight2": down.mT,
        }


class ScatterMoELayer(LayerSubject):
    """Runs ScatterMoE's gated experts.

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found]

        super().__init__(problem)
        model = problem.shape.model
        self._layer = GLUMLP(
            model.hidden_size, model.moe_ffn_hidden_size, model.num_experts, model.moe_router_topk
        ).to(problem.device, problem.dtype)
        weight1, weight2 = problem.expert_weights()
        with torch.no_grad():
            # ScatterMoE expects the up half first.
            self._layer.experts.weight.copy_(_swap_halves(weight1))
            self._layer.output_experts.weight.copy_(weight2)
        self._gates = problem.routing.gates.to(problem.dtype, copy=True).requires_grad_()

    def take_routing(self) -> None:
        """See `LayerSubject`; the experts are read in `forward`."""
        self._gates.copy_(self.problem.routing.gates)

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        output: Tensor = self._layer(self.hidden, self._gates, self.problem.routing.experts)
        return output

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters and gates."""
        yield from self._layer.parameters()
        yield self._gates

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        return {
            "gates": grad_of(self._gates),
            "weight1": _swap_halves(grad_of(self._layer.experts.weight)),
            "weight2": grad_of(self._layer.output_experts.weight),
        }


class ScatterMoAttention(LayerSubject):
    """Runs JetMoE's attention on ScatterMoE's projections; [b, s, h], heads slot by slot.

    Args:
        problem: inputs and weights.
    """

    def __init__(self, problem: LayerProblem) -> None:
        from scattermoe.parallel_experts import (  # type: ignore[import-not-found]
            ParallelExperts,
        )

        super().__init__(problem)
        model, weights = problem.shape.model, problem.attention_weights()
        experts, heads, width = weights["q"].shape
        self._heads, self._topk = model.num_query_groups or 0, model.attention_topk
        with problem.device:
            self._query = ParallelExperts(experts, width, heads).to(problem.dtype)
            self._output = ParallelExperts(experts, heads, width).to(problem.dtype)
        with torch.no_grad():
            self._query.weight.copy_(weights["q"])
            self._output.weight.copy_(weights["o"])
        self._keys_values = nn.Parameter(torch.cat((weights["k"], weights["v"])))
        self._bias = nn.Parameter(torch.zeros_like(weights["o"][0, :, 0]))
        self._gates = torch.empty_like(problem.routing.gates, dtype=problem.dtype)
        self.take_routing()
        self._gates.requires_grad_()
        self._angles = _angles(problem)

    def arrange(self, rows: Tensor) -> Tensor:
        """See `LayerSubject`."""
        return batch_first(rows)

    def take_routing(self) -> None:
        """See `LayerSubject`; rows become those of [b, s] tokens."""
        sizes = (self.problem.shape.seq_length, self.problem.shape.micro_batch_size)
        routing = self.problem.routing
        self._experts, gates = (
            each.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)
            for each in (routing.experts, routing.gates)
        )  # [t, k] each
        self._gates.copy_(gates)

    def forward(self) -> Tensor:
        """Compute the output [b, s, h]."""
        from scattermoe.parallel_experts import flatten_sort_count

        batch, length, _ = self.hidden.shape
        rows = self.hidden.flatten(0, 1)  # [t, h]
        order = flatten_sort_count(self._experts, num_experts=self._query.num_experts)
        queries = self._query(rows, self._topk, *order)  # [t * k, ng * hn]
        query = queries.view(batch, length, self._topk * self._heads, -1).transpose(1, 2)
        both = F.linear(rows, self._keys_values).view(batch, length, 2, self._heads, -1)
        key, value = both.permute(2, 0, 3, 1, 4)  # [b, ng, s, hn] each
        key = _rotate(key, self._angles).repeat(1, self._topk, 1, 1)
        value = value.repeat(1, self._topk, 1, 1)
        context = F.scaled_dot_product_attention(
            _rotate(query, self._angles), key, value, is_causal=True
        )  # [b, k * ng, s, hn]
        slots = context.transpose(1, 2).reshape(batch * length * self._topk, -1)
        output: Tensor = self._output(slots, 1, *order, gates=self._gates)  # [t, h]
        return (output + self._bias).view_as(self.hidden)

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters and gates."""
        yield from (self._query.weight, self._output.weight)
        yield from (self._keys_values, self._bias, self._gates)

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        sizes = (self.problem.shape.micro_batch_size, self.problem.shape.seq_length)
        gates = grad_of(self._gates).unflatten(0, sizes).transpose(0, 1).flatten(0, 1)
        key, value = grad_of(self._keys_values).chunk(2)
        return {
            "hidden": grad_of(self.hidden).transpose(0, 1),
            "gates": gates,
            "q": grad_of(self._query.weight),
            "o": grad_of(self._output.weight),
            "k": key,
            "v": value,
            "bias": grad_of(self._bias),
        }


def _swap_halves(rows: Tensor) -> Tensor:
    """Swap the two halves of [e, 2f, h]."""
    first, second = rows.chunk(2, dim=1)
    return torch.cat((second, first), dim=1)


def _angles(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine [s, hn] of half-rotation RoPE."""
    model, device = problem.shape.model, problem.device
    size = model.kv_channels or 0
    steps = model.rotary_base ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.arange(problem.shape.seq_length, device=device)[:, None] * steps
    both = torch.cat((angles, angles), dim=1)
    return both.cos().to(problem.dtype), both.sin().to(problem.dtype)


def _rotate(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to [b, heads, s, hn]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * angles[0] + torch.cat((-second, first), dim=-1) * angles[1]


def build_megablocks(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype
) -> LayerSubject:
    """Build the layer in a worker."""
    return MegaBlocksLayer(LayerProblem(shape, routing, device, dtype))


def build_scattermoe(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype
) -> LayerSubject:
    """Build the layer in a worker."""
    return ScatterMoELayer(LayerProblem(shape, routing, device, dtype))


def build_scattermoe_moa(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype
) -> LayerSubject:
    """Build the layer in a worker."""
    return ScatterMoAttention(LayerProblem(shape, routing, device, dtype))
