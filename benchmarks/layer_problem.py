"""Generates inputs, weights and routing of one layer, the same for every implementation."""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.digests import Digests, digest, random_tensor
from benchmarks.shapes import COMPARED, Routing, Shape, make_routing
from benchmarks.timing import synchronize


class LayerProblem:
    """Holds the weights that a layer is measured with, and a sample's inputs and routing.

    Tokens are laid out [s, b, h], as in megatron-core. An implementation with another layout views
    the same rows as one sequence of s * b tokens where order does not matter (experts), or gets a
    contiguous copy that is made before timing (attention).

    Args:
        shape: sizes.
        routing: a kind of `shapes.ROUTINGS`.
        device: where.
        dtype: of hidden states and weights.
    """

    def __init__(
        self, shape: Shape, routing: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._kind = routing
        self.renew(0)

    def renew(self, number: int) -> None:
        """Replace hidden states, upstream gradients and routing with those of a sample."""
        shape, model = self.shape, self.shape.model
        made = make_routing(
            self._kind,
            num_tokens=shape.num_tokens,
            num_experts=model.num_experts or 0,
            topk=model.moe_router_topk,
            rule=model.router,
            number=number,
        )
        self.routing = Routing(
            made.experts.to(self.device), made.gates.to(self.device), made.scores.to(self.device)
        )
        rows = (shape.seq_length, shape.micro_batch_size, model.hidden_size)
        self.hidden = self.tensor(f"hidden{number}", rows, std=1.0)  # [s, b, h]
        self.upstream = self.tensor(f"upstream{number}", rows, std=1.0)  # [s, b, h]

    def tensor(self, name: str, shape: tuple[int, ...], *, std: float) -> Tensor:
        """Sample numbers that are the same in every worker."""
        return random_tensor(name, shape, std=std, device=self.device).to(self.dtype)

    def expert_weights(self) -> tuple[Tensor, Tensor]:
        """Sample weight1 [e, 2f, h], gate rows first, and weight2 [e, h, f]."""
        model = self.shape.model
        experts, width, ffn = model.num_experts or 0, model.hidden_size, model.moe_ffn_hidden_size
        return (
            self.tensor("weight1", (experts, 2 * ffn, width), std=width**-0.5),
            self.tensor("weight2", (experts, width, ffn), std=ffn**-0.5),
        )

    def attention_weights(self) -> dict[str, Tensor]:
        """Sample q [e, ng * hn, h], o [e, h, ng * hn], k and v [ng * hn, h], ordered by head."""
        model = self.shape.model
        width = model.hidden_size
        heads = (model.num_query_groups or 0) * (model.kv_channels or 0)
        experts = model.attention_experts or 0
        return {
            "q": self.tensor("q", (experts, heads, width), std=width**-0.5),
            "o": self.tensor("o", (experts, width, heads), std=heads**-0.5),
            "k": self.tensor("k", (heads, width), std=width**-0.5),
            "v": self.tensor("v", (heads, width), std=width**-0.5),
        }

    def dense_gates(self) -> tuple[Tensor, Tensor]:
        """Returns gates as megatron-core has them: probs [t, e] fp32, routing_map [t, e] bool."""
        zeros = torch.zeros_like(self.routing.scores)
        probs = zeros.scatter(1, self.routing.experts, self.routing.gates)
        routing_map = zeros.bool().scatter(1, self.routing.experts, True)
        return probs, routing_map

    def chosen(self, dense: Tensor) -> Tensor:
        """Gather [t, k] from [t, e], in the order of the routing's experts."""
        return dense.gather(1, self.routing.experts)


class LayerSubject(ABC):
    """Runs forward and backward of one layer, with gradients of the hidden states.

    Each sample starts without gradients, on new inputs.

    Args:
        problem: inputs and upstream gradient.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        self.hidden = self.arrange(problem.hidden).clone().requires_grad_()
        self.upstream = self.arrange(problem.upstream)
        self.kept_bytes: int | None = None

    def arrange(self, rows: Tensor) -> Tensor:
        """Return [s, b, h] in the implementation's own layout."""
        return rows

    @abstractmethod
    def take_routing(self) -> None:
        """Use the problem's routing from now on; called without gradients."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Compute the layer's output, laid out like `upstream`."""

    @abstractmethod
    def leaves(self) -> Iterator[Tensor]:
        """Yield all tensors besides the hidden states that require gradients."""

    @abstractmethod
    def gradients(self) -> Mapping[str, Tensor]:
        """Return all gradients by common names, in a common layout."""

    def sample(self, number: int) -> Mapping[str, float]:
        """Measure `seconds` of one forward and backward pass on inputs made in advance."""
        self._take(number)
        synchronize(self.problem.device)
        started = time.perf_counter()
        self.forward().backward(self.upstream)
        synchronize(self.problem.device)
        seconds = time.perf_counter() - started
        if self.kept_bytes is None:  # a worker rebuilt for this visit has not run `check`
            return {"seconds": seconds}
        kept = self.kept_bytes / self.problem.shape.num_tokens
        return {"seconds": seconds, "kept_bytes_per_token": kept}

    def _take(self, number: int) -> None:
        """Use the inputs and the routing of a sample, without gradients of an earlier one."""
        self.problem.renew(number)
        with torch.no_grad():
            self.hidden.copy_(self.arrange(self.problem.hidden))
            self.upstream = self.arrange(self.problem.upstream)
            self.take_routing()
        self.release()

    def release(self) -> None:
        """Drop all gradients."""
        for leaf in itertools.chain([self.hidden], self.leaves()):
            leaf.grad = None

    def check(self) -> tuple[float, Digests]:
        """Compute the mean square of the output, and digests of all gradients.

        The inputs replace others, as a sample's do, so that what it compares are samples.
        """
        self._take(COMPARED)
        output, self.kept_bytes = kept_for_backward(self.forward, list(self.leaves()))
        output.backward(self.upstream)
        gradients = {"hidden": grad_of(self.hidden), **self.gradients()}
        return (
            output.detach().float().square().mean().item(),
            digest((name, 0, gradient) for name, gradient in gradients.items()),
        )


def kept_for_backward(
    forward: Callable[[], Tensor], parameters: list[Tensor]
) -> tuple[Tensor, int]:
    """Run a forward pass; return its output and the bytes that autograd saves for backward.

    Each storage counts once. Parameters do not count, nor what an implementation saves outside
    autograd, such as the project's order of the rows.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(kept.values())


def grad_of(tensor: Tensor) -> Tensor:
    """Return the gradient that backward has accumulated.

    Raises:
        ValueError: there is none.
    """
    if tensor.grad is None:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} got no gradient")
    return tensor.grad
