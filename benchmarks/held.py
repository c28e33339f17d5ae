"""What a rank's tensors hold, found by looking at them: storages, each counted once."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.trainer.state import TrainState
from megatron.trainer.step import language_model_step
from moe_ext.experts.slots import ExpertOrder


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def state_bytes(state: TrainState) -> dict[str, int]:
    """Weights, gradient buffers, and what the optimizer has besides the two."""
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
    """Masters, which may be the weights themselves, and moments."""
    for inner in state.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from filter(torch.is_tensor, inner.optimizer.state[parameter].values())


class _Held:
    """A tensor that autograd keeps; it goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """A forward step that counts what passes keep: for autograd, or by the order of rows.

    Weights and the batch are not counted, nor what lives for a moment.

    Args:
        state: whose step it is.
    """

    def __init__(self, state: TrainState) -> None:
        self._chunks = state.chunks
        self._others = set(storages(each for chunk in state.chunks for each in chunk.parameters()))
        self._held: list[weakref.ref[_Held]] = []
        self._waiting: list[tuple[list[weakref.ref[_Held]], int]] = []
        self.passes: list[tuple[int, int]] = []
        """Of each forward pass which chunk's it was, and what it keeps, in bytes."""
        self.highest = 0
        """Most bytes that passes have kept which wait for their backward pass."""

    def __call__(self, batches: Iterator[Any], model: torch.nn.Module) -> Any:
        """Take a `language_model_step`."""
        batch = next(batches)
        given = [each for each in vars(batch).values() if each is not None]
        self._others |= storages(given).keys()
        self._held = []
        earlier = _orders()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            result = language_model_step(iter([batch]), model)
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
        """Of what the last pass keeps."""
        tensors = [held.tensor for each in self._held if (held := each()) is not None]
        known = {id(order) for order in earlier}
        for order in _orders():
            if id(order) not in known:
                tensors += filter(torch.is_tensor, vars(order).values())
        found = storages(tensors)
        return sum(size for place, size in found.items() if place not in self._others)


def _orders() -> list[ExpertOrder]:
    """All that are alive: backward passes hold them where no hook of autograd sees it."""
    return [each for each in gc.get_referrers(ExpertOrder) if type(each) is ExpertOrder]
