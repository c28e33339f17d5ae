"""Measures the bytes of a rank's live tensors; each storage counts once."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.trainer.objective import TokenObjective
from megatron.trainer.state import TrainState
from moe_ext.experts.slots import ExpertOrder


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the address of each storage to its bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def state_bytes(state: TrainState) -> dict[str, int]:
    """Return the bytes of weights, gradient buffers and further optimizer state."""
    parameters = [each for chunk in state.chunks for each in chunk.parameters()]
    weights = storages(each.data for each in parameters)
    gradients = storages(each.main_grad for each in parameters)
    own = storages(_optimizer_tensors(state))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for place, size in own.items() if place not in weights),
    }


def _optimizer_tensors(state: TrainState) -> Iterator[Tensor]:
    """Yield master weights, which may be the weights themselves, and moments."""
    for inner in state.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from filter(torch.is_tensor, inner.optimizer.state[parameter].values())


class _Held:
    """Wraps a tensor that autograd saves; it is freed when autograd releases it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept(TokenObjective):
    """Runs forward steps and counts the bytes they save for backward, with the orders of rows.

    Weights, the batch and temporaries are not counted.

    Args:
        state: training state of the steps.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self._chunks = state.chunks
        self._others = set(storages(each for chunk in state.chunks for each in chunk.parameters()))
        self._held: list[weakref.ref[_Held]] = []
        self._waiting: list[tuple[list[weakref.ref[_Held]], int]] = []
        self.passes: list[tuple[int, int]] = []
        """For each forward pass the index of its chunk and the bytes it saves."""
        self.highest = 0
        """Peak of the bytes saved by passes whose backward is pending."""

    def forward(self, batches: Iterator[Any], model: torch.nn.Module) -> Any:
        """Run the forward step."""
        batch = next(batches)
        given = [each for each in vars(batch).values() if isinstance(each, Tensor)]
        self._others |= storages(given).keys()
        self._held = []
        earlier = orders()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            result = super().forward(iter([batch]), model)
        size = self._size(earlier)
        chunk = [each is model for each in self._chunks].index(True)
        self.passes.append((chunk, size))
        self._waiting.append((self._held, size))
        self._waiting = [each for each in self._waiting if any(held() for held in each[0])]
        self.highest = max(self.highest, sum(size for _, size in self._waiting))
        return result

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        self._held.append(weakref.ref(held))
        return held

    def _size(self, earlier: list[ExpertOrder]) -> int:
        """Return the bytes that the last pass saves."""
        tensors = [held.tensor for each in self._held if (held := each()) is not None]
        known = {id(order) for order in earlier}
        for order in orders():
            if id(order) not in known:
                tensors += filter(torch.is_tensor, vars(order).values())
        found = storages(tensors)
        return sum(size for place, size in found.items() if place not in self._others)


def orders() -> list[ExpertOrder]:
    """List all live orders; backward passes hold them without autograd's hooks seeing them."""
    return [each for each in gc.get_referrers(ExpertOrder) if type(each) is ExpertOrder]
