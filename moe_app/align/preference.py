"""Defines alignment as objectives of the trainer.

A text's log-probability is a sum over its positions, which context parallel ranks share. So the
sums are reduced first, the loss is differentiated by them on each rank alike, and the gradient of
each position is that of its text: backpropagated is sum(coefficient x log-probability) over this
rank's positions. docs/decisions/0011-objectives.md says why.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.trainer.data.batch import Batch
from megatron.trainer.objective import (
    LossFunction,
    Report,
    num_texts,
    run_model,
    share_of,
    sum_by_text,
    text_sizes,
)
from megatron.trainer.state import TrainState
from megatron.trainer.step import run_schedule
from moe_app.align.preference_losses import PreferenceTerms, dpo_terms, kto_terms

MISMATCHED = 2
"""Role of a completion of another prompt, from which KTO estimates the divergence."""

References = Callable[[TrainState, Sequence[Batch]], list[Tensor]]
"""Returns [n] log-probabilities of each micro-batch's texts under the reference; a collective call.
Empty tensors before the last pipeline stage."""


@dataclass(frozen=True, kw_only=True)
class TextLogProbs:
    """Computes log-probabilities of texts alone; the forward step of a pass without gradients.

    Args:
        group: context parallel ranks, which share the positions of a text.
        is_average: divide by the number of counted tokens.
    """

    group: dist.ProcessGroup
    is_average: bool

    def forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """Run megatron-core's forward step."""
        batch = next(batches)
        output = run_model(batch, model, loss_mask=None)

        def report(losses: Tensor) -> tuple[Tensor, Report]:
            sums = text_log_probs(losses, batch, self.group, is_average=self.is_average)
            return losses.sum() * 0.0, {"log_probs": sums}

        return output, report


def text_log_probs(
    losses: Tensor, batch: Batch, group: dist.ProcessGroup, *, is_average: bool
) -> Tensor:
    """Return [n] log-probabilities of a micro-batch's texts, without gradients.

    Args:
        losses: [b, s] cross-entropy of this rank's positions.
        batch: of these positions.
        group: context parallel ranks.
        is_average: divide by the number of counted tokens.
    """
    sums = sum_by_text(-losses.detach().float(), batch, num_texts(batch))
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums / batch.texts["sizes"].clamp(min=1.0) if is_average else sums


def log_probs_of(
    state: TrainState,
    chunks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    is_average: bool = False,
) -> list[Tensor]:
    """Compute log-probabilities of texts by a pass without gradients; a collective call.

    Args:
        state: of the run.
        chunks: this rank's chunks of the model to ask.
        batches: as `Objective.prepare` gets them.
        is_average: divide by the number of counted tokens.

    Returns:
        [n] for each micro-batch; empty tensors before the last pipeline stage.
    """
    work = TextLogProbs(group=state.ctx.groups.cp, is_average=is_average)
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        found = run_schedule(state, chunks, work.forward, batches, forward_only=True)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    if not found:
        return [torch.empty(0, device=state.ctx.device) for _ in batches]
    return [each["log_probs"] for each in found]


class PreferenceObjective(ABC):
    """Minimizes a loss of texts' log-probabilities relative to a reference's.

    Args:
        references: gives the reference's log-probabilities.
        is_average: log-probabilities are means over counted tokens, not sums.
    """

    loss_name: str
    metric_names: tuple[str, ...]

    def __init__(self, references: References, *, is_average: bool) -> None:
        self._references = references
        self.is_average = is_average
        self._context_group: dist.ProcessGroup | None = None

    def weigh(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """See `Objective.weigh`; the sum is divided by the pairs or completions."""
        self._context_group = state.ctx.groups.cp
        sized = [with_sizes(batch) for batch in batches]
        counts = [self.num_items(batch) for batch in sized]
        each = share_of(state, sized, counts)
        return [replace(batch, loss_tokens=each) for batch in sized]

    def prepare(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """See `Objective.prepare`: add the reference's log-probabilities."""
        found = self._references(state, batches)
        return [
            replace(batch, texts={**batch.texts, "reference": each})
            for batch, each in zip(batches, found, strict=True)
        ]

    def derive(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures with those that follow from others."""
        return figures

    @abstractmethod
    def num_items(self, batch: Batch) -> Tensor:
        """Return [] float64, the losses of a micro-batch."""

    @abstractmethod
    def terms(self, log_probs: Tensor, texts: Mapping[str, Tensor]) -> PreferenceTerms:
        """Compute the losses of a micro-batch from its texts' log-probabilities [n]."""

    @abstractmethod
    def figures(
        self, terms: PreferenceTerms, log_probs: Tensor, texts: Mapping[str, Tensor]
    ) -> Report:
        """Return what is reported, without gradients."""

    def forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """See `Objective.forward`."""
        batch = next(batches)
        # How each loss weighs is known only when all of its text's are.
        output = run_model(batch, model, loss_mask=None)

        def loss(losses: Tensor) -> tuple[Tensor, Report]:
            losses = losses.float()
            group = self._context_group
            assert group is not None  # `weigh` sets it
            sums = text_log_probs(losses, batch, group, is_average=self.is_average)
            with torch.enable_grad():
                leaf = sums.requires_grad_()
                terms = self.terms(leaf, batch.texts)
                denominator = batch.loss_tokens
                assert denominator is not None  # `weigh` sets it
                total = terms.losses.sum() / denominator
                (coefficients,) = torch.autograd.grad(total, leaf)
            if self.is_average:
                coefficients = coefficients / batch.texts["sizes"].clamp(min=1.0)
            surrogate = (_spread(coefficients, batch) * -losses).sum()
            with torch.no_grad():
                report = self.figures(terms, sums, batch.texts)
            return surrogate, report

        return output, loss


class DPOObjective(PreferenceObjective):
    """Minimizes DPO's loss over pairs.

    Args:
        references: gives the reference's log-probabilities.
        beta: strength of the reference.
        label_smoothing: probability that a preference is the wrong way round.
        is_average: log-probabilities are means over counted tokens.
    """

    loss_name = "dpo_loss"
    metric_names = (
        "dpo_loss",
        *("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy"),
        *("logps_chosen", "logps_rejected"),
    )

    def __init__(
        self,
        references: References,
        *,
        beta: float,
        label_smoothing: float = 0.0,
        is_average: bool = False,
    ) -> None:
        super().__init__(references, is_average=is_average)
        self.beta, self.label_smoothing = beta, label_smoothing

    def num_items(self, batch: Batch) -> Tensor:
        """Return the pairs."""
        return _number(num_texts(batch) // 2, batch)

    def terms(self, log_probs: Tensor, texts: Mapping[str, Tensor]) -> PreferenceTerms:
        """See `PreferenceObjective.terms`."""
        return dpo_terms(
            log_probs, texts["reference"], beta=self.beta, label_smoothing=self.label_smoothing
        )

    def figures(
        self, terms: PreferenceTerms, log_probs: Tensor, texts: Mapping[str, Tensor]
    ) -> Report:
        """Return means over pairs."""
        margin = terms.chosen_rewards - terms.rejected_rewards
        return {
            "dpo_loss": _mean(terms.losses),
            "rewards_chosen": _mean(terms.chosen_rewards),
            "rewards_rejected": _mean(terms.rejected_rewards),
            "rewards_margin": _mean(margin),
            "rewards_accuracy": _mean((margin > 0).float()),
            "logps_chosen": _mean(log_probs[0::2]),
            "logps_rejected": _mean(log_probs[1::2]),
        }


class KTOObjective(PreferenceObjective):
    """Minimizes KTO's loss over completions.

    The divergence is estimated over the mismatched completions of the whole global batch, so it
    does not depend on micro-batching, as it does elsewhere.

    Args:
        references: gives the reference's log-probabilities.
        beta: strength of the reference.
        desirable_weight: of desirable completions.
        undesirable_weight: of the others.
        is_average: log-probabilities are means over counted tokens.
    """

    loss_name = "kto_loss"
    metric_names = (
        "kto_loss",
        *("rewards_chosen", "rewards_rejected", "rewards_accuracy"),
        *("logps_chosen", "logps_rejected", "kl"),
    )

    def __init__(
        self,
        references: References,
        *,
        beta: float,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        is_average: bool = False,
    ) -> None:
        super().__init__(references, is_average=is_average)
        self.beta = beta
        self.weights = (desirable_weight, undesirable_weight)

    def num_items(self, batch: Batch) -> Tensor:
        """Return the completions that have a loss."""
        return (batch.texts["role"] != MISMATCHED).sum().double()

    def prepare(self, state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
        """Add the reference's log-probabilities and the estimate of the divergence."""
        prepared = super().prepare(state, batches)
        policy = log_probs_of(state, state.chunks, prepared, is_average=self.is_average)
        kl = self._divergence(state, prepared, policy)
        return [replace(batch, texts={**batch.texts, "kl": kl}) for batch in prepared]

    def derive(self, figures: dict[str, float]) -> dict[str, float]:
        """Add the margin, which is that of the means."""
        margin = figures["rewards_chosen"] - figures["rewards_rejected"]
        return {**figures, "rewards_margin": margin}

    def _divergence(
        self, state: TrainState, batches: Sequence[Batch], policy: Sequence[Tensor]
    ) -> Tensor:
        """Return [], the mean log-ratio of mismatched completions of the global batch, or 0."""
        total = torch.zeros(2, dtype=torch.float64, device=state.ctx.device)
        for batch, mine in zip(batches, policy, strict=True):
            if len(mine):
                # Where a text was cut before its answer, there is nothing to compare.
                is_mismatched = (batch.texts["role"] == MISMATCHED) & (batch.texts["sizes"] > 0)
                ratios = (mine - batch.texts["reference"])[is_mismatched]
                total += torch.stack((ratios.double().sum(), is_mismatched.sum().double()))
        dist.all_reduce(total, group=state.ctx.groups.dp)
        return (total[0] / total[1].clamp(min=1.0)).clamp(min=0.0).float()

    def terms(self, log_probs: Tensor, texts: Mapping[str, Tensor]) -> PreferenceTerms:
        """See `PreferenceObjective.terms`."""
        own = texts["role"] != MISMATCHED
        return kto_terms(
            log_probs[own],
            texts["reference"][own],
            texts["role"][own] == 1,
            texts["kl"],
            beta=self.beta,
            desirable_weight=self.weights[0],
            undesirable_weight=self.weights[1],
        )

    def figures(
        self, terms: PreferenceTerms, log_probs: Tensor, texts: Mapping[str, Tensor]
    ) -> Report:
        """Return means over completions; one is right on its side of the divergence."""
        border = self.beta * texts["kl"]
        right = torch.cat((terms.chosen_rewards > border, terms.rejected_rewards < border))
        one = torch.ones_like(texts["kl"])
        return {
            "kto_loss": _mean(terms.losses),
            "rewards_chosen": _mean(terms.chosen_rewards),
            "rewards_rejected": _mean(terms.rejected_rewards),
            "rewards_accuracy": _mean(right.float()),
            "logps_chosen": _mean(log_probs[texts["role"] == 1]),
            "logps_rejected": _mean(log_probs[texts["role"] == 0]),
            "kl": torch.stack((texts["kl"], one)),
        }


def with_sizes(batch: Batch) -> Batch:
    """Add each text's number of counted tokens, [n]."""
    return replace(batch, texts={**batch.texts, "sizes": text_sizes(batch)})


def _spread(coefficients: Tensor, batch: Batch) -> Tensor:
    """Return [b, s], for each counted position the coefficient of its text."""
    segments = batch.segments
    assert segments is not None  # `sum_by_text` needs them too
    spread = coefficients[segments.clamp(min=0)] * batch.loss_mask
    return torch.where(segments >= 0, spread, 0.0)


def _number(count: int, batch: Batch) -> Tensor:
    return torch.full((), float(count), dtype=torch.float64, device=batch.tokens.device)


def _mean(values: Tensor) -> Tensor:
    """Return a figure of a report, [2]: the sum of values, and how many there are."""
    count = torch.full((), float(len(values)), device=values.device)
    return torch.stack((values.detach().sum(), count))
