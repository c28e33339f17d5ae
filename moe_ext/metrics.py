"""Collects routing statistics of all ranks in one collective."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOE = "moe"
"""The routers of the feed-forward layers."""
MOA = "moa"
"""The routers of the self-attentions."""

# Columns of the accumulator ahead of the e expert counts.
_BALANCE, _MICRO_BATCHES, _Z, _ENTROPY, _TOKENS = range(5)
_NUM_SCALARS = 5
# And behind them, where tokens have unequal numbers of experts.
_DROPPED, _UNROUTED = range(-2, 0)
_NUM_VARYING = 2


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """Reports routing over the micro-batches since the last report, all ranks and layers.

    Losses carry no coefficient. A layer that recorded nothing is NaN in the lists and left out of
    the means; without any record the means are NaN.
    """

    load_balancing_loss: float
    """Mean over layers and micro-batches; 1 is balanced."""
    z_loss: float
    """Mean over layers and tokens of logsumexp(logits)^2."""
    layer_load_balancing_loss: list[float]
    """Per layer, mean over micro-batches."""
    layer_z_loss: list[float]
    """Per layer, mean over tokens."""
    layer_entropy: list[float]
    """Per layer, mean over tokens of the routing entropy in nats."""
    layer_max_load_ratio: list[float]
    """Per layer, the busiest expert's assignments over the mean expert's; 1 is balanced."""
    layer_dead_experts: list[int]
    """Per layer, experts that received no token."""
    load: Tensor
    """[num_layers, e] fp64 on the host: an expert's share of the assignments times e."""
    dropped_share: float | None = None
    """Share of the assignments that were dropped, over all layers; None where none can be."""
    unrouted_share: float | None = None
    """Share of the tokens that no expert computed, over all layers; None where all have one."""

    def as_dict(self, kind: str = MOE) -> dict[str, float]:
        """Returns scalars for a log line; empty if nothing was recorded.

        Args:
            kind: of the routers, MOE or MOA; names the keys.
        """
        prefix = _prefix(kind)
        ratios = _present(self.layer_max_load_ratio)
        if not ratios:
            return {}
        varying = {
            f"{kind}_dropped_share": self.dropped_share,
            f"{kind}_unrouted_share": self.unrouted_share,
        }
        return {
            f"{prefix}load_balancing_loss": self.load_balancing_loss,
            f"{prefix}z_loss": self.z_loss,
            f"{kind}_entropy": _mean(self.layer_entropy),
            f"{kind}_max_load_ratio": max(ratios),
            f"{kind}_mean_load_ratio": _mean(self.layer_max_load_ratio),
            f"{kind}_dead_experts": float(sum(self.layer_dead_experts)),
            **{name: value for name, value in varying.items() if value is not None},
        }

    def layers_as_dict(self, kind: str = MOE) -> dict[str, list[float] | list[int]]:
        """Returns the lists per layer, by the names they have in a run's records.

        Args:
            kind: of the routers, MOE or MOA; names the keys.
        """
        prefix = _prefix(kind)
        return {
            f"{prefix}layer_load_balancing_loss": self.layer_load_balancing_loss,
            f"{prefix}layer_z_loss": self.layer_z_loss,
            f"{prefix}layer_max_load_ratio": self.layer_max_load_ratio,
            f"{prefix}layer_dead_experts": self.layer_dead_experts,
            f"{prefix}layer_entropy": self.layer_entropy,
        }


class RouterMetrics:
    """Accumulates routing statistics on the device that computes them, without synchronising.

    Not a module: nothing of it is saved. One instance serves the routers of one kind in all of a
    rank's model chunks.

    Args:
        num_layers: of the whole model.
        num_experts: e.
        is_varying: whether tokens can have unequal numbers of experts, so that it is counted.
    """

    def __init__(self, num_layers: int, num_experts: int, *, is_varying: bool = False) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.is_varying = is_varying
        self._sums: Tensor | None = None  # [num_layers, 5 + e, or 2 more] fp64

    def record(
        self,
        layer_number: int,
        *,
        load_balancing: Tensor,
        z_sum: Tensor,
        entropy_sum: Tensor,
        tokens_per_expert: Tensor,
        num_tokens: int | Tensor,
        group_size: int,
        dropped: Tensor | None = None,
        unrouted: Tensor | None = None,
    ) -> None:
        """Adds one micro-batch of one layer.

        Args:
            layer_number: 1 for the model's first layer.
            load_balancing: [] this rank's addend of the load-balancing loss, without gradient.
            z_sum: [] sum of logsumexp^2 over this rank's tokens, without padding.
            entropy_sum: [] sum of the routing entropy over this rank's tokens.
            tokens_per_expert: [e] assignments of this rank's tokens.
            num_tokens: tokens on this rank; [] where they are counted.
            group_size: ranks that share the micro-batch, each of which records its part.
            dropped: [] assignments of this rank's tokens that no expert computed, of those
                counted; None for none.
            unrouted: [] tokens on this rank that no expert computed; None for none.

        Raises:
            ValueError: the layer or the number of experts is not one of this instance.
        """
        if tokens_per_expert.shape != (self.num_experts,):
            raise ValueError(
                f"tokens_per_expert must be [{self.num_experts}], "
                f"got {list(tokens_per_expert.shape)}"
            )
        row = self._row(layer_number, tokens_per_expert.device)
        row[_BALANCE] += load_balancing
        # Every rank of the group adds its part of a loss, and its part of one micro-batch.
        row[_MICRO_BATCHES] += 1.0 / group_size
        row[_Z] += z_sum
        row[_ENTROPY] += entropy_sum
        row[_TOKENS] += num_tokens
        row[_NUM_SCALARS : _NUM_SCALARS + self.num_experts] += tokens_per_expert
        if self.is_varying:
            row[_DROPPED] += 0 if dropped is None else dropped
            row[_UNROUTED] += 0 if unrouted is None else unrouted

    def add(self, layer_number: int, columns: Tensor) -> None:
        """Adds one micro-batch of one layer, whose tokens have k experts each, as one vector.

        Args:
            layer_number: 1 for the model's first layer.
            columns: [5 + e] fp64: what `record` takes as load_balancing, 1 / group_size, z_sum,
                entropy_sum and num_tokens, then tokens_per_expert.

        Raises:
            ValueError: the layer or the number of experts is not one of this instance.
        """
        if columns.shape != (_NUM_SCALARS + self.num_experts,):
            raise ValueError(
                f"columns must be [{_NUM_SCALARS + self.num_experts}], got {list(columns.shape)}"
            )
        row = self._row(layer_number, columns.device)
        row[: len(columns)].add_(columns)

    def _row(self, layer_number: int, device: torch.device) -> Tensor:
        """Returns a layer's sums."""
        if not 1 <= layer_number <= self.num_layers:
            raise ValueError(
                f"layer number ({layer_number}) must be between 1 and num_layers "
                f"({self.num_layers})"
            )
        if self._sums is None:
            self._sums = self._zeros(device)
        return self._sums[layer_number - 1]

    def reset(self) -> None:
        """Drops what was recorded."""
        self._sums = None

    def reduce(self, group: torch.distributed.ProcessGroup | None = None) -> RouterReport:
        """Sums over all ranks, reports, and starts again from zero.

        Collective: every rank of the group calls it, also one that holds no MoE layer. Ranks that
        hold copies of a layer add to numerators and denominators alike.

        Args:
            group: None means the world, which is right under any parallel layout.
        """
        distributed = torch.distributed.is_initialized()
        if self._sums is not None:
            sums = self._sums
        else:
            sums = self._zeros(torch.cuda.current_device() if distributed else "cpu")
        self.reset()
        if distributed:
            torch.distributed.all_reduce(sums, group=group)  # sum over `group`
        return _report(sums.cpu(), self.num_experts, is_varying=self.is_varying)

    def _zeros(self, device: torch.device | int | str) -> Tensor:
        shape = (
            self.num_layers,
            _NUM_SCALARS + self.num_experts + _NUM_VARYING * self.is_varying,
        )
        return torch.zeros(shape, dtype=torch.float64, device=device)


def _report(sums: Tensor, num_experts: int, *, is_varying: bool) -> RouterReport:
    """Turns summed columns [num_layers, 5 + e, or 2 more] into means."""
    counts = sums[:, _NUM_SCALARS : _NUM_SCALARS + num_experts]  # [num_layers, e]
    load = counts / counts.mean(dim=1, keepdim=True)  # 0 / 0 is NaN: a layer without a record
    recorded = sums[:, _TOKENS] > 0
    balance = (sums[:, _BALANCE] / sums[:, _MICRO_BATCHES]).tolist()
    z_loss = (sums[:, _Z] / sums[:, _TOKENS]).tolist()
    return RouterReport(
        load_balancing_loss=_mean(balance),
        z_loss=_mean(z_loss),
        layer_load_balancing_loss=balance,
        layer_z_loss=z_loss,
        layer_entropy=(sums[:, _ENTROPY] / sums[:, _TOKENS]).tolist(),
        layer_max_load_ratio=load.amax(dim=1).tolist(),
        layer_dead_experts=((counts == 0).sum(dim=1) * recorded).tolist(),
        load=load,
        dropped_share=float(sums[:, _DROPPED].sum() / counts.sum()) if is_varying else None,
        unrouted_share=(
            float(sums[:, _UNROUTED].sum() / sums[:, _TOKENS].sum()) if is_varying else None
        ),
    )


def _prefix(kind: str) -> str:
    """Returns the prefix of the keys of losses and lists."""
    return "" if kind == MOE else f"{kind}_"


def _present(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: list[float]) -> float:
    present = _present(values)
    return sum(present) / len(present) if present else math.nan
