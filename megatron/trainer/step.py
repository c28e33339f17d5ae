"""Runs one forward-backward-update, or one evaluation pass; no I/O."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import separate_documents, shard_positions
from megatron.trainer.errors import StepRefusedError
from megatron.trainer.optim.adamw import apply_schedule, clip_gradients
from megatron.trainer.state import ForwardStep, TrainState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Holds the outcome of a step; the same on every rank."""

    lm_loss: float
    """Mean cross-entropy over the tokens of the global batch, nats."""
    grad_norm: float
    """Global gradient norm before clipping; NaN where it was not measured."""
    learning_rate: float
    """Learning rate of this update."""
    global_batch_size: int
    """Sequences of the global batch."""
    skipped: str | None = None
    """Why there was no update; None if there was one."""


def language_model_step(
    batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """Run megatron-core's forward step for next-token prediction.

    Args:
        batches: micro-batches of this rank; `tokens` and `labels` are [b, s], this context
            parallel rank's positions.
        model: a model chunk, wrapped.

    Returns:
        The chunk's output (losses [b, s] on the last stage, hidden states before) and the function
        that turns it into (mean loss, {"loss_sum", "tokens"}).
    """
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask(),
        labels=batch.labels,
        loss_mask=batch.loss_mask,
    )

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch.loss_mask
        total = (losses.float() * mask).sum()
        tokens = mask.sum()
        # Where one is given, it makes the gradient the mean over all tokens of the global batch.
        denominator = tokens if batch.loss_tokens is None else batch.loss_tokens
        return total / denominator.clamp(min=1.0), {"loss_sum": total.detach(), "tokens": tokens}

    return output, loss


def train_step(state: TrainState, forward_step: ForwardStep) -> StepResult:
    """Take the next global batch, update the weights, and count the iteration.

    A step whose loss or gradient norm the guard refuses is skipped: it is counted, but weights and
    optimizer do not change.

    Raises:
        StepRefusedError: it is one more than may be skipped; raised on every rank alike, with
            weights and iteration as before.
    """
    first_sample = state.train_data.consumed_samples
    learning_rate = state.learning_rate
    size = state.plan.batches.size_at(state.progress.samples)
    batches = state.train_data.next_global_batch(
        global_batch_size=size,
        micro_batch_size=state.cfg.training.micro_batch_size,
        data_parallel_rank=state.ctx.data_parallel_rank,
        data_parallel_size=state.ctx.layout.data,
    )
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    parts = _forward_backward(state, forward_step, batches, forward_only=False)
    lm_loss = _mean_loss(state, parts)
    grad_norm = math.nan
    problem = _agreed(state, state.guard.loss_problem(lm_loss))
    if problem is not None:
        where = f"{problem} at iteration {state.iteration + 1}, in global samples"
        bad = _bad_samples(state, parts, first_sample)
    else:
        apply_schedule(
            state.optimizer, lr=learning_rate, weight_decay=state.cfg.optimizer.weight_decay
        )
        grad_norm, problem = _update(state)
        where = f"{problem} at iteration {state.iteration + 1} (loss {lm_loss:g}), global samples"
        bad = f"{first_sample} to {state.train_data.consumed_samples - 1}"
    if problem is None:
        state.guard.took(loss=lm_loss, norm=grad_norm)
    elif not state.guard.skip():
        raise StepRefusedError(_refusal(state, f"{where} {bad}"))
    state.iteration += 1
    return StepResult(
        lm_loss=lm_loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        global_batch_size=size,
        skipped=None if problem is None else f"{where} {bad}",
    )


def _update(state: TrainState) -> tuple[float, str | None]:
    """Clip the gradients and update the weights, unless the guard refuses the gradient norm.

    These are the parts of `ChainedOptimizer.step`; between the norm and its use the ranks agree.

    Returns:
        The gradient norm before clipping, and why there was no update; None if there was one.
    """
    optimizer = state.optimizer
    if optimizer.prepare_grads():
        return math.nan, "the optimizer found gradients that are not finite"
    norm = float(optimizer.get_grad_norm())
    problem = _agreed(state, state.guard.norm_problem(norm))
    if problem is not None:
        return norm, problem
    clip_gradients(optimizer, norm)
    if not optimizer.step_with_ready_grads():
        return math.nan, "the optimizer refused the update"
    return norm, None


def _agreed(state: TrainState, problem: str | None) -> str | None:
    """Return this rank's problem or, where only others have one, that they do.

    A number that is not finite is so on every rank. Replicas may differ in the last digit, which
    can decide about a spike; only then is an all-reduce needed.
    """
    if not state.guard.looks_for_spikes:
        return problem
    refused = torch.tensor(float(problem is not None), device=state.ctx.device)
    dist.all_reduce(refused, op=dist.ReduceOp.MAX)
    return problem or ("another rank sees a spike" if refused.item() else None)


def _refusal(state: TrainState, what: str) -> str:
    """Describe why the run cannot go on, with the remedy."""
    skipped = state.guard.skipped_in_row - 1
    before = f" after {skipped} skipped in a row (--max-skipped)" if skipped else ""
    return (
        f"{what}{before}; the weights were not updated and no checkpoint was written. Resume from"
        " the last checkpoint with a lower --lr, or look at those samples"
    )


def evaluate(
    state: TrainState,
    forward_step: ForwardStep,
    name: str,
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> float | None:
    """Compute the mean cross-entropy of a validation set, nats per token; a collective call.

    Args:
        state: of the run.
        forward_step: as in training.
        name: of the set.
        is_over: called before each global batch, on every rank; True stops the evaluation.

    Returns:
        The mean, or None where it was stopped.
    """
    cfg = state.cfg
    batches = state.validation[name].batches(
        cfg.evaluation.eval_iters,
        global_batch_size=cfg.training.global_batch_size,
        micro_batch_size=cfg.training.micro_batch_size,
        data_parallel_rank=state.ctx.data_parallel_rank,
        data_parallel_size=state.ctx.layout.data,
    )
    for chunk in state.chunks:
        chunk.eval()
    parts = []
    is_stopped = False
    with torch.no_grad():
        for global_batch in batches:
            if is_stopped := is_over():
                break
            parts += _forward_backward(state, forward_step, global_batch, forward_only=True)
    for chunk in state.chunks:
        chunk.train()
    return None if is_stopped else _mean_loss(state, parts)


def _forward_backward(
    state: TrainState, forward_step: ForwardStep, batches: Sequence[Batch], *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """Run the schedule over this rank's micro-batches.

    Returns:
        For each micro-batch what the loss function reported; empty before the last stage.
    """
    cfg = state.cfg.training
    on_device = _place(state, batches)
    iterators = [iter(on_device) for _ in state.chunks]
    parts: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=state.chunks,
        num_microbatches=len(batches),
        seq_length=cfg.seq_length,
        micro_batch_size=cfg.micro_batch_size,
        forward_only=forward_only,
    )
    return parts


def _place(state: TrainState, batches: Sequence[Batch]) -> list[Batch]:
    """Return this rank's part of its micro-batches, on its device, as the model takes them.

    megatron-core averages over micro-batches and data parallel ranks. Where these count different
    numbers of tokens, a mean of their means would weigh tokens by the size of their micro-batch; so
    each divides its sum of losses by the mean number of tokens, which gives the mean over all
    tokens.
    """
    groups = state.ctx.groups
    placed = [batch.to(state.ctx.device) for batch in batches]
    if state.documents is not None:
        placed = [separate_documents(batch, state.documents) for batch in placed]
    counted = torch.stack([_counted(batch) for batch in placed]).sum()
    dist.all_reduce(counted, group=groups.dp)  # sum over the ranks that read other samples
    each = (counted / (len(placed) * groups.dp.size())).float()
    return [
        shard_positions(
            replace(batch, loss_tokens=each), rank=groups.cp.rank(), size=groups.cp.size()
        )
        for batch in placed
    ]


def _counted(batch: Batch) -> torch.Tensor:
    """Return [] float64, what a micro-batch adds to what the sum of losses is divided by."""
    if batch.loss_tokens is None:
        return batch.loss_mask.sum(dtype=torch.float64)
    return batch.loss_tokens.double()


def _mean_loss(state: TrainState, parts: Sequence[dict[str, torch.Tensor]]) -> float:
    """Compute the mean loss over all tokens of all ranks.

    Tensor parallel ranks count their copies alike, in sum and in number; stages before the last
    add nothing. So one all-reduce over the world gives the mean.
    """
    total = torch.zeros(2, dtype=torch.float64, device=state.ctx.device)
    for part in parts:
        total[0] += part["loss_sum"]
        total[1] += part["tokens"]
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return float(loss_sum / tokens) if tokens else math.nan


def _bad_samples(
    state: TrainState, parts: Sequence[dict[str, torch.Tensor]], first_sample: int
) -> str:
    """Name the samples whose loss is not finite, or all of the batch; a collective call."""
    size = state.cfg.training.micro_batch_size
    mine = [
        (first_sample + (index * state.ctx.layout.data + state.ctx.data_parallel_rank) * size)
        for index, part in enumerate(parts)
        if not math.isfinite(part["loss_sum"].item())
    ]
    found: list[list[int]] = [[] for _ in range(state.ctx.world_size)]
    dist.all_gather_object(found, mine)
    starts = sorted({start for each in found for start in each})
    if not starts:
        return f"{first_sample} to {state.train_data.consumed_samples - 1}"
    samples = ", ".join(
        str(start) if size == 1 else f"{start} to {start + size - 1}" for start in starts[:8]
    )
    more = f" and {len(starts) - 8} micro-batches more" if len(starts) > 8 else ""
    return f"{samples}{more}"
