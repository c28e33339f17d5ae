"""Says what a step minimizes: the loss of a micro-batch, and what its sum is divided by.

Pretraining, fine-tuning and alignment are one loop with different objectives. An objective sees the
whole global batch of its data parallel rank before the forward pass, so that a gradient does not
depend on how samples fall on micro-batches and ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.trainer.data.batch import Batch
from megatron.trainer.records.losses import BITS_PER_BYTE, PERPLEXITY, perplexity
from megatron.trainer.state import TrainState

Report = dict[str, Tensor]
"""Figures of a micro-batch by name: [2] each, what is summed over all ranks and what that sum is
divided by."""
LossFunction = Callable[[Tensor], tuple[Tensor, Report]]
Reduction = Literal["token-mean", "sum", "sample-mean"]


class Objective(Protocol):
    """Declares what a step asks of an objective."""

    @property
    def loss_name(self) -> str:
        """Return the name of the loss in records; `Report` has it."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of a report's figures, the loss first."""

    def derive(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of a global batch with those that follow from others."""

    def weigh(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """Set what the sum of each micro-batch is divided by; a collective call.

        megatron-core averages over micro-batches and data parallel ranks; a sum over the global
        batch is divided by N where each micro-batch divides its own by N / (micro-batches x ranks).

        Args:
            state: of the run.
            batches: this rank's micro-batches, on its device, of whole sequences.
        """

    def prepare(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """Add to the micro-batches, now of this rank's positions, what the loss needs.

        May run passes over all ranks.
        """

    def forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """Run megatron-core's forward step.

        Returns:
            The chunk's output (losses [b, s] on the last stage, hidden states before) and the
            function that turns it into the loss whose gradient is taken, and a report.
        """


@dataclass
class TokenObjective:
    """Minimizes next-token cross-entropy over the counted tokens.

    Args:
        reduction: `token-mean` divides the sum of the global batch by its counted tokens, `sum` by
            nothing, `sample-mean` is the mean over texts of each one's mean.
    """

    reduction: Reduction = "token-mean"
    loss_name = "lm_loss"
    metric_names = ("lm_loss",)

    def derive(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures as they are."""
        return figures

    def weigh(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """See `Objective.weigh`."""
        if self.reduction == "sample-mean":
            batches = [replace(batch, loss_weights=_text_weights(batch)) for batch in batches]
        if self.reduction == "sum":
            each = torch.full((), 1.0 / _parts(state, batches), device=state.ctx.device)
        else:
            each = share_of(state, batches, [self._counted(batch) for batch in batches])
        return [replace(batch, loss_tokens=each) for batch in batches]

    def _counted(self, batch: Batch) -> Tensor:
        """Return [] float64, what a micro-batch adds to what the sum of losses is divided by."""
        if self.reduction == "sample-mean":
            return text_sizes(batch).count_nonzero().double()
        if batch.loss_tokens is None:
            return batch.loss_mask.sum(dtype=torch.float64)
        return batch.loss_tokens.double()

    def prepare(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches as they are."""
        return list(batches)

    def forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """See `Objective.forward`."""
        batch = next(batches)
        mask = batch.loss_mask
        weights = mask if batch.loss_weights is None else mask * batch.loss_weights
        output = run_model(batch, model, loss_mask=weights)

        def loss(losses: Tensor) -> tuple[Tensor, Report]:
            losses = losses.float()
            total = (losses * weights).sum()
            tokens = mask.sum()
            # Where one is given, it makes the gradient that of the objective of the global batch.
            denominator = tokens if batch.loss_tokens is None else batch.loss_tokens
            counted = total if batch.loss_weights is None else (losses * mask).sum()
            # A batch without counted tokens has a sum of 0, and no NaN.
            mean = total / denominator.clamp(min=torch.finfo(torch.float32).tiny)
            return mean, {self.loss_name: torch.stack((counted.detach(), tokens))}

        return output, loss


NEXT_TOKEN = TokenObjective()
"""The objective of pretraining."""


@dataclass
class EvaluatedTokens:
    """Adds what validation reports beside a loss of tokens: perplexity, and bits per byte.

    Args:
        objective: whose loss is the cross-entropy of tokens.
        token_bytes: [v] bytes of each token's text; None leaves bits per byte out.
    """

    objective: Objective
    token_bytes: Tensor | None

    @property
    def loss_name(self) -> str:
        """See `Objective.loss_name`."""
        return self.objective.loss_name

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Objective.metric_names`."""
        bits = () if self.token_bytes is None else (BITS_PER_BYTE,)
        return (*self.objective.metric_names, *bits)

    def derive(self, figures: dict[str, float]) -> dict[str, float]:
        """See `Objective.derive`."""
        found = self.objective.derive(figures)
        return {**found, PERPLEXITY: perplexity(found[self.loss_name])}

    def weigh(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """See `Objective.weigh`."""
        return self.objective.weigh(state, batches)

    def prepare(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """See `Objective.prepare`."""
        return self.objective.prepare(state, batches)

    def forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """See `Objective.forward`."""
        batch = next(batches)
        output, loss = self.objective.forward(iter((batch,)), model)
        table = self.token_bytes
        if table is None:
            return output, loss

        def counted(losses: Tensor) -> tuple[Tensor, Report]:
            mean, report = loss(losses)
            nats = report[self.loss_name][0]
            size = torch.where(batch.loss_mask > 0, table[batch.labels], 0).sum()
            report[BITS_PER_BYTE] = torch.stack((nats.double() / math.log(2), size.double()))
            return mean, report

        return output, counted


def with_perplexity(objective: Objective, token_bytes: Tensor | None) -> Objective:
    """Return an objective that reports more of tokens in validation; the same one for others."""
    is_of_tokens = objective.loss_name == NEXT_TOKEN.loss_name
    return EvaluatedTokens(objective, token_bytes) if is_of_tokens else objective


def run_model(batch: Batch, model: nn.Module, *, loss_mask: Tensor | None) -> Tensor:
    """Run a chunk on a micro-batch.

    Args:
        batch: `tokens` and `labels` are [b, s], this context parallel rank's positions.
        model: a model chunk, wrapped.
        loss_mask: [b, s], proportional to the gradients that the losses will get; None where these
            are not known yet.
    """
    output: Tensor = model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask(),
        labels=batch.labels,
        loss_mask=loss_mask,
        padding_mask=batch.padding,
        cu_seqlens=batch.borders if batch.is_varlen else None,
    )
    return output


def share_of(state: TrainState, batches: Sequence[Batch], counts: Sequence[Tensor]) -> Tensor:
    """Return [] float32, the mean of counts over all micro-batches of the global batch.

    A collective call over the ranks that read other samples.
    """
    total = torch.stack(list(counts)).sum()
    dist.all_reduce(total, group=state.ctx.groups.dp)
    return (total / _parts(state, batches)).float()


def _parts(state: TrainState, batches: Sequence[Batch]) -> int:
    """Return the micro-batches of the global batch."""
    return len(batches) * int(state.ctx.groups.dp.size())


def sum_by_text(values: Tensor, batch: Batch, count: int) -> Tensor:
    """Sum counted values of each text: [b, s] to [n], in the same order every time.

    Args:
        values: [b, s].
        batch: with `segments` and a mask of the same positions.
        count: texts of the micro-batch (n).
    """
    if batch.segments is None:
        raise ValueError("the batch has no segments; its source must say which text is where")
    numbers = torch.arange(count, device=values.device)[:, None]  # [n, 1]
    belongs = batch.segments.flatten()[None] == numbers  # [n, b * s]
    counted = (values * batch.loss_mask).flatten()[None]  # [1, b * s]
    return torch.where(belongs, counted, 0.0).sum(dim=1)


def num_texts(batch: Batch) -> int:
    """Return the texts of a micro-batch (n)."""
    return len(batch.texts["role"])


def text_sizes(batch: Batch) -> Tensor:
    """Return [n], the counted tokens of each text of a micro-batch of whole sequences."""
    return sum_by_text(torch.ones_like(batch.loss_mask), batch, num_texts(batch))


def _text_weights(batch: Batch) -> Tensor:
    """Return [b, s], for each position one over the counted tokens of its text."""
    inverse = 1.0 / text_sizes(batch).clamp(min=1.0)
    segments: Any = batch.segments
    return torch.where(segments >= 0, inverse[segments.clamp(min=0)], 0.0)
