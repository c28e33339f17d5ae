"""Implements layers of megatron-core: with the project's experts, its own, Transformer Engine's."""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from benchmarks.layer_problem import LayerProblem, LayerSubject, grad_of
from benchmarks.native import start
from benchmarks.shapes import Shape
from moe_ext.attention import MoASelfAttention, MoASubmodules, SDPACoreAttention
from moe_ext.experts import ExpertMLP, look_up_backend
from moe_ext.experts.layer import ExpertsLayer
from moe_ext.functional import Routing
from moe_ext.layers.rotary import RotaryAngles
from moe_ext.layers.transformer import transformer_config

TE_GROUPED, SEQUENTIAL = "te-grouped", "megatron-core-sequential"
"""Kinds of experts that are not the project's."""


class GivenRouting(nn.Module):
    """Replaces a router of the project and returns the routing of the problem.

    Experts are in ascending order, as the project's routers have them.

    Args:
        problem: gives experts, gates and scores.
    """

    def __init__(self, problem: LayerProblem) -> None:
        super().__init__()
        self._problem = problem
        self.gates = nn.Parameter(torch.empty_like(problem.routing.gates))
        with torch.no_grad():
            self.take()

    def take(self) -> None:
        """Use the problem's routing from now on."""
        given = self._problem.routing
        self.experts, order = given.experts.sort(dim=-1)
        self.scores = given.scores
        self.gates.copy_(given.gates.gather(1, order))
        self._back = order.argsort(dim=-1)

    def set_layer_number(self, layer_number: int) -> None:
        """Ignore the layer number, because nothing is recorded."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Return the given routing."""
        return Routing(self.experts, self.gates, self.scores)

    def gates_gradient(self) -> Tensor:
        """Return the gradient [t, k], in the order of the problem's experts."""
        return grad_of(self.gates).gather(1, self._back)


class GivenDenseRouting(nn.Module):
    """Replaces a router of megatron-core and returns the problem's routing as [t, e] tensors.

    Args:
        problem: gives experts and gates.
    """

    def __init__(self, problem: LayerProblem) -> None:
        super().__init__()
        self._problem = problem
        probs, self.routing_map = problem.dense_gates()
        self.probs = nn.Parameter(probs)

    def take(self) -> None:
        """Use the problem's routing from now on."""
        probs, self.routing_map = self._problem.dense_gates()
        self.probs.copy_(probs)

    def set_layer_number(self, layer_number: int) -> None:
        """Ignore the layer number, because nothing is recorded."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the given routing."""
        return self.probs, self.routing_map

    def gates_gradient(self) -> Tensor:
        """Return the gradient [t, k], in the order of the problem's experts."""
        return self._problem.chosen(grad_of(self.probs))


class ExpertsSubject(LayerSubject):
    """Runs the project's or megatron-core's layer of experts under a given routing.

    Args:
        problem: inputs and weights.
        kind: "native:BACKEND", SEQUENTIAL or TE_GROUPED.
        config: megatron-core's.
        groups: this rank's process groups.
    """

    def __init__(
        self,
        problem: LayerProblem,
        kind: str,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(problem)
        self._kind = kind
        is_native = kind.startswith("native:")
        self._router = (GivenRouting if is_native else GivenDenseRouting)(problem)
        spec = MoESubmodules(experts=_experts_spec(kind), router=lambda **_: self._router)
        layer = ExpertsLayer if is_native else MoELayer
        self._layer = layer(config=config, submodules=spec, pg_collection=groups)
        self._layer.to(problem.device)
        weight1, weight2 = problem.expert_weights()
        with torch.no_grad():
            for mine, given in zip(self._weights(), (weight1, weight2), strict=True):
                for part, rows in zip(mine, given, strict=True):
                    part.copy_(rows.view_as(part))

    def take_routing(self) -> None:
        """See `LayerSubject`."""
        self._router.take()

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Yield each expert's two matrices, [2f, h] and [h, f], or tensors of the same numel."""
        experts = self._layer.experts
        if isinstance(experts, SequentialMLP):
            each = experts.local_experts
            return [x.linear_fc1.weight for x in each], [x.linear_fc2.weight for x in each]
        if self._kind == TE_GROUPED:
            number = range(self.problem.shape.model.num_experts or 0)
            return (
                [getattr(experts.linear_fc1, f"weight{i}") for i in number],
                [getattr(experts.linear_fc2, f"weight{i}") for i in number],
            )
        return list(experts.weight1), list(experts.weight2)

    def _gradients_of(self, which: int) -> Tensor:
        """Stack the gradients to [e, 2f, h] or [e, h, f]."""
        experts = self._layer.experts
        if isinstance(experts, ExpertMLP):
            gradient = grad_of((experts.weight1, experts.weight2)[which])
            return gradient.flatten(1, 2) if which == 0 else gradient
        return torch.stack([grad_of(weight) for weight in self._weights()[which]])

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        output, _ = self._layer(self.hidden)
        return output

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters, including the gates."""
        yield from self._layer.parameters()

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        return {
            "gates": self._router.gates_gradient(),
            "weight1": self._gradients_of(0),
            "weight2": self._gradients_of(1),
        }


def build_experts(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype, kind: str
) -> LayerSubject:
    """Build an `ExpertsSubject` in a worker."""
    config, groups = _configure(device, shape, dtype)
    return ExpertsSubject(LayerProblem(shape, routing, device, dtype), kind, config, groups)


def _configure(
    device: torch.device, shape: Shape, dtype: torch.dtype
) -> tuple[TransformerConfig, ProcessGroupCollection]:
    cfg, ctx = start(
        shape.model,
        device=device,
        dtype=dtype,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
        learning_rate=1e-4,
    )
    return transformer_config(cfg.model, bf16=cfg.training.bf16), ctx.groups


def _experts_spec(kind: str) -> ModuleSpec:
    if kind == TE_GROUPED:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        grouped = MLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
        )
        return ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    if kind == SEQUENTIAL:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return ModuleSpec(module=SequentialMLP, submodules=linears)
    return ModuleSpec(module=ExpertMLP, params={"backend": look_up_backend(kind.partition(":")[2])})


class MoALayer(LayerSubject):
    """Runs the project's mixture of attention heads under a given routing.

    Args:
        problem: inputs and weights.
        backend: a name in moe_ext's EXPERT_BACKENDS.
        config: megatron-core's.
        groups: this rank's process groups.
    """

    def __init__(
        self,
        problem: LayerProblem,
        backend: str,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(problem)
        model = problem.shape.model
        self._router = GivenRouting(problem)
        self._layer = MoASelfAttention(
            config,
            MoASubmodules(
                router=lambda **_: self._router,  # type: ignore[arg-type]
                core_attention=SDPACoreAttention,
            ),
            layer_number=1,
            pg_collection=groups,
            num_experts=model.attention_experts or 0,
            topk=model.attention_topk,
            backend=look_up_backend(backend),
        ).to(problem.device)
        weights = problem.attention_weights()
        # Key and value heads alternate: [ng, 2, hn, h].
        pairs = torch.stack([self._by_head(weights[name]) for name in "kv"], dim=1)
        with torch.no_grad():
            self._layer.experts.weight_q.copy_(weights["q"])
            self._layer.experts.weight_o.copy_(weights["o"])
            self._layer.linear_kv.weight.copy_(pairs.flatten(0, 2))
        positions = torch.arange(problem.shape.seq_length, device=problem.device)[None]  # [1, s]
        self._angles = RotaryAngles(model.kv_channels or 0, base=model.rotary_base)(positions)

    def take_routing(self) -> None:
        """See `LayerSubject`."""
        self._router.take()

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.problem.shape.model.num_query_groups or 0, -1))

    def forward(self) -> Tensor:
        """Compute the output [s, b, h]."""
        output, _ = self._layer(self.hidden, None, rotary_pos_emb=self._angles)
        return output

    def leaves(self) -> Iterator[Tensor]:
        """Yield parameters, including the gates."""
        yield from self._layer.parameters()

    def gradients(self) -> Mapping[str, Tensor]:
        """See `LayerSubject`."""
        keys_values = grad_of(self._layer.linear_kv.weight)
        groups = self.problem.shape.model.num_query_groups or 0
        by_head = keys_values.unflatten(0, (groups, 2, -1))  # [ng, 2, hn, h]
        return {
            "gates": self._router.gates_gradient(),
            "q": grad_of(self._layer.experts.weight_q),
            "o": grad_of(self._layer.experts.weight_o),
            "k": by_head[:, 0].flatten(0, 1),
            "v": by_head[:, 1].flatten(0, 1),
            "bias": grad_of(self._layer.output_bias),
        }


def build_moa(
    device: torch.device, shape: Shape, routing: str, dtype: torch.dtype, kind: str
) -> LayerSubject:
    """Build the layer in a worker; kind is "native:BACKEND"."""
    config, groups = _configure(device, shape, dtype)
    problem = LayerProblem(shape, routing, device, dtype)
    return MoALayer(problem, kind.partition(":")[2], config, groups)
