"""Runs one forward-backward-update, or one evaluation pass; no I/O."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import separate_documents, shard_positions
from megatron.trainer.errors import StepRefusedError
from megatron.trainer.objective import Objective, Report
from megatron.trainer.optim.adamw import apply_schedule
from megatron.trainer.optim.update import clip_gradients, norm_of, squared_norms
from megatron.trainer.state import ForwardStep, TrainState


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Holds the outcome of a step; the same on every rank."""

    loss: float
    """The objective over the global batch; in pretraining mean cross-entropy, nats a token."""
    metrics: Mapping[str, float]
    """All figures of the objective by name, the loss among them."""
    grad_norm: float
    """Global gradient norm before clipping; NaN where it was not measured."""
    learning_rate: float
    """Learning rate of this update."""
    global_batch_size: int
    """Sequences of the global batch."""
    skipped: str | None = None
    """Why there was no update; None if there was one."""
    notice: int = 0
    """The largest that a rank gave notice of; 0 where none was asked."""


def train_step(
    state: TrainState, objective: Objective, *, notice: Callable[[], int] | None = None
) -> StepResult:
    """Take the next global batch, update the weights, and count the iteration.

    A step whose loss or gradient norm the guard refuses is skipped: it is counted, but weights and
    optimizer do not change.

    Args:
        state: of the run.
        objective: what is minimized.
        notice: returns a number that all ranks should know the largest of; called at the end of the
            backward pass. None on every rank if there is none.

    Raises:
        StepRefusedError: it is one more than may be skipped; raised on every rank alike, with
            weights and iteration as before.
    """
    first_sample = state.train_data.consumed_samples
    learning_rate = state.learning_rate
    size = state.plan.batches.size_at(state.progress.samples)
    parts = _accumulate(state, objective, size)
    found = _measure(state, objective, parts, notice)
    loss = found.metrics[objective.loss_name]
    grad_norm = math.nan
    problem = state.guard.loss_problem(loss)
    if problem is not None:
        where = f"{problem} at iteration {state.iteration + 1}, in global samples"
        bad = _bad_samples(state, objective, parts, first_sample)
    else:
        apply_schedule(
            state.optimizer, lr=learning_rate, weight_decay=state.cfg.optimizer.weight_decay
        )
        grad_norm, problem = _update(state, found.grad_norm)
        where = f"{problem} at iteration {state.iteration + 1} (loss {loss:g}), global samples"
        bad = f"{first_sample} to {state.train_data.consumed_samples - 1}"
    if problem is None:
        state.guard.took(loss=loss, norm=grad_norm)
        if state.updates is not None:
            state.updates.finish()
    elif not state.guard.skip():
        raise StepRefusedError(_refusal(state, f"{where} {bad}"))
    state.iteration += 1
    return StepResult(
        loss=loss,
        metrics=found.metrics,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        global_batch_size=size,
        skipped=None if problem is None else f"{where} {bad}",
        notice=found.notice,
    )


def _accumulate(state: TrainState, objective: Objective, size: int) -> list[Report]:
    """Read the next global batch of `size` sequences and compute its gradients."""
    batches = state.train_data.next_global_batch(
        global_batch_size=size,
        micro_batch_size=state.cfg.training.micro_batch_size,
        data_parallel_rank=state.ctx.data_parallel_rank,
        data_parallel_size=state.ctx.layout.data,
    )
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    if state.updates is not None:
        state.updates.begin()
    placed = objective.prepare(state, _place(state, objective, batches))
    return run_schedule(state, state.chunks, objective.forward, placed, forward_only=False)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Holds what is known of a step after its backward pass; the same on every rank."""

    metrics: dict[str, float]
    grad_norm: float | None
    """Before clipping; None where the optimizer found gradients that are not finite."""
    notice: int


def _measure(
    state: TrainState,
    objective: Objective,
    parts: Sequence[Report],
    notice: Callable[[], int] | None,
) -> _Measured:
    """Compute figures and gradient norm of a step; a collective call.

    All of it is read from the device at once: here alone a step's host waits for its device.
    """
    total = _sum(state, objective, parts)
    is_finite = not state.optimizer.prepare_grads()
    squares = squared_norms(state.optimizer, state.ctx.device)
    noted = torch.zeros(1, dtype=torch.float64, device=state.ctx.device)
    if notice is not None:
        noted.fill_(notice())
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
    found = torch.cat((noted, squares.double(), total.flatten()))
    if state.guard.looks_for_spikes:
        # Replicas may differ in the last digit of a norm, which can decide about a spike.
        dist.broadcast(found, src=0)
    largest, *values = found.tolist()
    return _Measured(
        metrics=_figures(objective, values[len(squares) :]),
        grad_norm=norm_of(values[: len(squares)]) if is_finite else None,
        notice=int(largest),
    )


def _update(state: TrainState, norm: float | None) -> tuple[float, str | None]:
    """Clip the gradients and update the weights, unless the guard refuses the gradient norm.

    Returns:
        The gradient norm before clipping, and why there was no update; None if there was one.
    """
    if norm is None:
        return math.nan, "the optimizer found gradients that are not finite"
    problem = state.guard.norm_problem(norm)
    if problem is not None:
        return norm, problem
    clip_gradients(state.optimizer, norm)
    if not state.optimizer.step_with_ready_grads():
        return math.nan, "the optimizer refused the update"
    return norm, None


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
    objective: Objective,
    name: str,
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Compute the figures of an objective over a validation set; a collective call.

    Args:
        state: of the run.
        objective: as in training.
        name: of the set.
        is_over: called before each global batch, on every rank; True stops the evaluation.

    Returns:
        The figures by name, or None where it was stopped.
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
            placed = objective.prepare(state, _place(state, objective, global_batch))
            parts += run_schedule(state, state.chunks, objective.forward, placed, forward_only=True)
    for chunk in state.chunks:
        chunk.train()
    if is_stopped:
        return None
    return _figures(objective, _sum(state, objective, parts).flatten().tolist())


def observe(state: TrainState, objective: Objective, batches: Sequence[Batch]) -> None:
    """Run a forward pass in evaluation mode, for hooks on modules to observe; a collective call.

    Args:
        state: of the run.
        objective: as in training.
        batches: this rank's micro-batches of a global batch.
    """
    for chunk in state.chunks:
        chunk.eval()
    with torch.no_grad():
        placed = objective.prepare(state, _place(state, objective, batches))
        run_schedule(state, state.chunks, objective.forward, placed, forward_only=True)
    for chunk in state.chunks:
        chunk.train()


def run_schedule(
    state: TrainState,
    chunks: Sequence[torch.nn.Module],
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    *,
    forward_only: bool,
) -> list[Report]:
    """Run megatron-core's schedule over this rank's micro-batches; a collective call.

    Args:
        state: of the run.
        chunks: this rank's model chunks, of the policy or of a frozen model of the same layout.
        forward_step: of an objective.
        batches: as `Objective.prepare` returns them, all of one shape.
        forward_only: compute no gradients.

    Returns:
        For each micro-batch what the loss function reported; empty before the last stage.
    """
    iterators = [iter(batches) for _ in chunks]
    parts: list[Report] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1] * state.ctx.layout.context,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    return parts


def _place(state: TrainState, objective: Objective, batches: Sequence[Batch]) -> list[Batch]:
    """Return this rank's part of its micro-batches, on its device, as the model takes them."""
    groups = state.ctx.groups
    placed = [batch.to(state.ctx.device) for batch in batches]
    if state.documents is not None:
        placed = [separate_documents(batch, state.documents) for batch in placed]
    return [
        shard_positions(batch, rank=groups.cp.rank(), size=groups.cp.size())
        for batch in objective.weigh(state, placed)
    ]


def _sum(state: TrainState, objective: Objective, parts: Sequence[Report]) -> Tensor:
    """Sum an objective's figures over all micro-batches of all ranks; a collective call.

    Tensor parallel ranks count their copies alike, in sum and in number; stages before the last
    add nothing. So one all-reduce over the world gives each mean.

    Returns:
        [n, 2] float64 on the device, what to divide and by what.
    """
    names = objective.metric_names
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=state.ctx.device)
    for part in parts:
        total += torch.stack([part[name].double() for name in names])
    dist.all_reduce(total)
    return total


def _figures(objective: Objective, sums: Sequence[float]) -> dict[str, float]:
    """Return an objective's figures by name, from what `_sum` has found, in a row."""
    pairs = zip(objective.metric_names, sums[::2], sums[1::2], strict=True)
    figures = {
        name: numerator / denominator if denominator else math.nan
        for name, numerator, denominator in pairs
    }
    return objective.derive(figures)


def _bad_samples(
    state: TrainState, objective: Objective, parts: Sequence[Report], first_sample: int
) -> str:
    """Name the samples whose loss is not finite, or all of the batch; a collective call."""
    size = state.cfg.training.micro_batch_size
    mine = [
        (first_sample + (index * state.ctx.layout.data + state.ctx.data_parallel_rank) * size)
        for index, part in enumerate(parts)
        if not math.isfinite(part[objective.loss_name][0].item())
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
