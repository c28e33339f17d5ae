"""Captures what routers choose during forward passes, and runs passes over windows of tokens."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron.trainer.inference.scoring import plan_batches
from moe_app.analyze.texts import Tokens, Window
from moe_ext.analysis.model_routers import RouterId
from moe_ext.analysis.ordering import by_gate
from moe_ext.functional import Routing, routing_entropy
from moe_ext.routers import MoERouter


class RoutingCapture:
    """Keeps the last routing of every router while its context is open.

    Args:
        routers: to observe.
    """

    def __init__(self, routers: Mapping[RouterId, MoERouter]) -> None:
        self._routers = routers
        self.last: dict[RouterId, Routing] = {}

    @contextlib.contextmanager
    def observing(self) -> Iterator["RoutingCapture"]:
        """Observe within the context."""
        handles = [
            router.register_forward_hook(self._keeper(name))
            for name, router in self._routers.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.last.clear()

    def _keeper(self, name: RouterId) -> Any:
        def keep(_module: nn.Module, _inputs: object, routing: Routing) -> None:
            self.last[name] = Routing(*(tensor.detach() for tensor in routing))

        return keep


@dataclass(kw_only=True)
class RouterPart:
    """Holds what one router did with some windows, one after the other."""

    experts: list[npt.NDArray[np.int16]] = field(default_factory=list)
    """[n, k] of each window, the largest gate first."""
    gates: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """[n, k] of each window."""
    counts: list[npt.NDArray[np.int32]] = field(default_factory=list)
    """[e] of each window: tokens that chose each expert."""
    scores: list[npt.NDArray[np.float64]] = field(default_factory=list)
    """[e] of each window: sums of the probabilities."""
    entropy: list[float] = field(default_factory=list)
    """Of each window: sum of the entropies of the probabilities, nats."""

    def add(self, routing: Routing, lengths: Sequence[int]) -> None:
        """Take in a batch.

        Args:
            routing: of [s * b] tokens, those of a position one after the other.
            lengths: of the b windows; what lies behind is padding.
        """
        batch, num_experts = len(lengths), routing.scores.shape[1]
        choices = by_gate(routing)
        shape = (-1, batch)
        experts = choices.experts.view(*shape, choices.experts.shape[1])  # [s, b, k]
        scores = routing.scores.view(*shape, num_experts).double()  # [s, b, e]
        entropy = routing_entropy(routing.scores.double()).view(shape)  # [s, b]
        if min(lengths) < len(entropy):
            ends = torch.tensor(lengths, device=entropy.device)
            is_padding = torch.arange(len(entropy), device=entropy.device)[:, None] >= ends
            scores = scores.masked_fill(is_padding[..., None], 0.0)
            entropy = entropy.masked_fill(is_padding, 0.0)
        self.scores += list(_host(scores.sum(dim=0), np.float64))
        self.entropy += entropy.sum(dim=0).tolist()
        mine = _by_window(experts, lengths, np.int16)
        self.experts += mine
        self.gates += _by_window(choices.gates.view_as(experts), lengths, np.float32)
        self.counts += [
            np.bincount(each.reshape(-1), minlength=num_experts).astype(np.int32) for each in mine
        ]


def _host(tensor: Tensor, dtype: Any) -> Any:
    return np.ascontiguousarray(tensor.cpu().numpy().astype(dtype))


def _by_window(values: Tensor, lengths: Sequence[int], dtype: Any) -> list[Any]:
    """Return what [s, b, ...] has of each window, without padding."""
    # One array a batch: many small ones would lie scattered between the tensors of the passes.
    rows = _host(values.transpose(0, 1), dtype)  # [b, s, ...]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@dataclass(kw_only=True)
class ShardPart:
    """Holds what this rank knows of a shard's windows."""

    windows: list[int] = field(default_factory=list)
    """Numbers of the windows, in the order of the lists below."""
    routers: dict[RouterId, RouterPart] = field(default_factory=dict)
    """This pipeline stage's routers."""
    predicted: list[Tokens] = field(default_factory=list)
    """[n] of each window, on the last stage: the likeliest next token; empty elsewhere."""
    num_broken: int = 0
    """Positions whose logits are not finite."""


class Model(Protocol):
    """Predicts tokens, on one rank or many."""

    def likeliest(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the likeliest next tokens [b, n] and their logits; None without a head."""
        ...


def run_windows(
    model: Model,
    capture: RoutingCapture,
    windows: Sequence[Window],
    *,
    tokens_per_batch: int,
    rank: int,
    size: int,
    is_kept: bool,
) -> ShardPart:
    """Run forward passes over windows; a collective call.

    Args:
        model: the model.
        capture: observes its routers.
        windows: all of a shard, the same on every rank.
        tokens_per_batch: of a forward pass, with padding.
        rank: of this data parallel replica, which takes every `size`-th batch.
        size: number of replicas.
        is_kept: whether this rank returns what its stage did; its copies return nothing.
    """
    part = ShardPart()
    batches = plan_batches(
        [len(window.tokens) for window in windows], tokens_per_batch=tokens_per_batch
    )
    for start in range(0, len(batches), size):
        # Every rank makes as many passes: under expert parallelism each is collective.
        mine = batches[start + rank] if start + rank < len(batches) else []
        lengths = [len(windows[number].tokens) for number in mine] or [1]
        tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)  # [b, s]
        for row, number in enumerate(mine):
            tokens[row, : lengths[row]] = torch.from_numpy(windows[number].tokens.astype(np.int64))
        position_ids = torch.arange(tokens.shape[1]).expand(*tokens.shape)
        best = model.likeliest(tokens, position_ids)
        if not mine or not is_kept:
            continue
        part.windows += mine
        for name, routing in capture.last.items():
            part.routers.setdefault(name, RouterPart()).add(routing, lengths)
        if best is not None:
            ids, values = best
            part.predicted += _by_window(ids.T, lengths, np.int32)
            part.num_broken += sum(
                int((~row[:length].isfinite()).sum())
                for row, length in zip(values, lengths, strict=True)
            )
    return part
