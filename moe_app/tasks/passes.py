"""Computes rows' log-probabilities by passes of the training model, under any layout."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.trainer.config.schema import RunConfig
from megatron.trainer.data.batch import Batch
from megatron.trainer.data.batch_views import shard_positions
from megatron.trainer.data.tokenizer import check_embedding, load_tokenizer
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.scoring import Continuation
from megatron.trainer.objective import LossFunction, Report, run_model
from megatron.trainer.records.tasks import ACCURACY, BITS, DOCUMENTS
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.runtime.launch import RunContext
from megatron.trainer.state import TrainState
from megatron.trainer.step import run_schedule
from moe_app.tasks.documents import add_documents, document_record
from moe_app.tasks.items import read_tasks
from moe_app.tasks.rows import TaskRows, TaskScore, encode_tasks, score_task

logger = logging.getLogger("pretrain")

_WIDTH_STEP = 8
"""Rows are padded to a multiple of it, so that few shapes occur."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Holds the rows of one call of the schedule: micro-batches of one shape on every rank."""

    width: int
    """Positions of a row."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Rows of each micro-batch; number j of data parallel rank r is j * ranks + r."""
    size: int
    """Rows of a micro-batch, empty ones included."""


def plan_rounds(
    lengths: Sequence[int],
    *,
    ranks: int,
    micro_batches: int,
    tokens: int,
    width_step: int,
    longest: int,
) -> list[Round]:
    """Group rows of similar lengths, longest first; the same on every rank.

    Args:
        lengths: positions of each row.
        ranks: data parallel ranks, which share a round.
        micro_batches: of each rank in a round.
        tokens: the most positions of a micro-batch, padding included.
        width_step: the widths' divisor.
        longest: the widest row, which `width_step` divides as the layout needs.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = ranks * micro_batches
    rounds = []
    start = 0
    while start < len(order):
        width = min(longest, math.ceil(lengths[order[start]] / width_step) * width_step)
        size = min(max(1, tokens // width), math.ceil((len(order) - start) / parts))
        chunks = [order[start + part * size : start + (part + 1) * size] for part in range(parts)]
        rounds.append(Round(width=width, micro_batches=tuple(map(tuple, chunks)), size=size))
        start += parts * size
    return rounds


class RowPasses:
    """Computes log-probabilities of rows with a run's model; every rank makes the same passes.

    A micro-batch has no more tokens than one of training, and needs no gradients.

    Args:
        rows: what to score.
        cfg: of the run.
        ctx: its ranks.
    """

    def __init__(self, rows: Sequence[Continuation], cfg: RunConfig, ctx: RunContext) -> None:
        layout, training = ctx.layout, cfg.training
        split = layout.tensor if layout.sequence_parallel else 1
        # Context parallel ranks take an early and a late chunk each, tensor parallel ones a part.
        step = layout.context * math.lcm(2, split) if layout.context > 1 else split
        self._rows = rows
        self.rounds = plan_rounds(
            [len(each.ids) - 1 for each in rows],
            ranks=layout.data,
            micro_batches=2 * layout.pipeline if layout.pipeline > 1 else 1,
            tokens=training.micro_batch_size * training.seq_length,
            width_step=math.lcm(step, _WIDTH_STEP),
            longest=training.seq_length,
        )

    def log_probs(
        self, state: TrainState, *, is_over: Callable[[], bool] = lambda: False
    ) -> list[float] | None:
        """Return the log-probability of each row's last tokens, in nats; a collective call.

        Args:
            state: of the run.
            is_over: called before each round, on every rank; True stops.

        Returns:
            The same on every rank, or None where it was stopped.
        """
        # The last entry takes what belongs to no row.
        totals = torch.zeros(len(self._rows) + 1, dtype=torch.float64, device=state.ctx.device)
        is_stopped = False
        for chunk in state.chunks:
            chunk.eval()
        with torch.no_grad():
            for each in self.rounds:
                if is_stopped := is_over():
                    break
                batches = self._batches(each, state.ctx)
                for part in run_schedule(
                    state, state.chunks, _sum_rows, batches, forward_only=True
                ):
                    totals.index_add_(0, part["row"], -part["losses"])
        for chunk in state.chunks:
            chunk.train()
        if is_stopped:
            return None
        if state.ctx.groups.tp.rank() != 0:
            totals.zero_()  # copies of the first rank's
        dist.all_reduce(totals)  # over the world: context parallel ranks have parts of each sum
        found: list[float] = totals[:-1].tolist()
        return found

    def _batches(self, each: Round, ctx: RunContext) -> list[Batch]:
        """Return this rank's micro-batches of a round, its positions alone."""
        mine = each.micro_batches[ctx.data_parallel_rank :: ctx.layout.data]
        cp = ctx.groups.cp
        return [
            shard_positions(self._batch(rows, each).to(ctx.device), rank=cp.rank(), size=cp.size())
            for rows in mine
        ]

    def _batch(self, rows: Sequence[int], each: Round) -> Batch:
        """Pad rows on the right, and with empty rows, to the round's shape."""
        tokens = torch.zeros(each.size, each.width, dtype=torch.int64)
        padding = torch.ones_like(tokens, dtype=torch.bool)
        labels, loss_mask = torch.zeros_like(tokens), torch.zeros(tokens.shape)
        numbers = torch.full((each.size,), len(self._rows))
        for place, row in enumerate(rows):
            ids, count = torch.tensor(self._rows[row].ids), self._rows[row].count
            end = len(ids) - 1
            tokens[place, :end], labels[place, :end] = ids[:-1], ids[1:]
            loss_mask[place, end - count : end] = 1.0
            padding[place, :end] = False
            numbers[place] = row
        return Batch(
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            padding=padding,
            position_ids=torch.arange(each.width)[None],
            texts={"row": numbers},
        )


def _sum_rows(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
    """Run megatron-core's forward step, which reports the summed losses of each row."""
    batch = next(batches)
    mask = batch.loss_mask
    output = run_model(batch, model, loss_mask=mask)

    def sums(losses: Tensor) -> tuple[Tensor, Report]:
        counted = torch.where(mask > 0, losses.double(), 0.0).sum(dim=1)  # [b]
        return counted.sum().float(), {"row": batch.texts["row"], "losses": counted}

    return output, sums


class InTraining:
    """Scores tasks at each evaluation of a run.

    Args:
        tasks: the tasks, the same on every rank.
        cfg: of the run.
        ctx: its ranks.
    """

    def __init__(self, tasks: TaskRows, cfg: RunConfig, ctx: RunContext) -> None:
        self._tasks = tasks
        self.passes = RowPasses(tasks.rows, cfg, ctx)

    def evaluate(
        self, state: TrainState, *, is_over: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Return what an evaluation's record says of the tasks; a collective call.

        Args:
            state: of the run.
            is_over: called before each round, on every rank; True stops.

        Returns:
            The figures, or None where it was stopped.
        """
        started = time.perf_counter()
        log_probs = self.passes.log_probs(state, is_over=is_over)
        if log_probs is None:
            return None
        texts = self._tasks.documents
        scores = {name: score_task(items, log_probs) for name, items in self._tasks.tasks.items()}
        found = document_record(texts, log_probs)
        seconds = time.perf_counter() - started
        return score_record(scores or None, found or None, seconds=seconds)

    def describe(self) -> list[str]:
        """Return lines for the log."""
        items = ", ".join(f"{name} {len(each):,}" for name, each in self._tasks.tasks.items())
        rows = self._tasks.rows
        tokens = sum(len(each.ids) - 1 for each in rows)
        texts = [f"{name} {len(each):,}" for name, each in self._tasks.documents.items()]
        what = [f"items of {items}"] if items else []
        what += [f"documents of {', '.join(texts)}"] if texts else []
        lines = [
            f"tasks at each evaluation: {'; '.join(what)}; {len(rows):,} rows of {tokens:,} tokens,"
            f" {len(self.passes.rounds):,} passes"
        ]
        if self._tasks.num_cut:
            lines.append(
                f"tasks: {self._tasks.num_cut:,} rows are cut from the left to --seq-length"
            )
        return lines


def score_record(
    scores: Mapping[str, TaskScore] | None,
    documents: Mapping[str, Mapping[str, float]] | None,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Make an evaluation's part of `metrics.jsonl`; docs/run_directory.md defines every number.

    Args:
        scores: of each task; None for no tasks.
        documents: figures of each validation set; None where no documents were scored.
        seconds: that it took.
    """
    record: dict[str, Any] = {}
    if scores is not None:
        record[ACCURACY] = {name: each.accuracy for name, each in scores.items()}
        record[BITS] = {name: each.bits_per_byte for name, each in scores.items()}
    if documents is not None:
        record[DOCUMENTS] = documents
    return {**record, "task_seconds": round(seconds, 3)}


def open_tasks(
    cfg: Any, ctx: RunContext, validation: Mapping[str, ValidationSet]
) -> InTraining | None:
    """Read and encode on rank 0 what a run scores; None for nothing; a collective call.

    Args:
        cfg: of the run, with its model.
        ctx: its ranks.
        validation: sets whose documents may be scored.

    Raises:
        UserError: on every rank; a file, a line or the tokenizer is not what it must be.
    """
    given, num_documents = cfg.evaluation.eval_tasks, cfg.evaluation.eval_documents
    if not given and not num_documents:
        return None

    def read() -> TaskRows:
        data = cfg.data
        if data.tokenizer_model is None:
            raise ConfigError(
                f"{'--eval-tasks' if given else '--eval-documents'} needs a tokenizer, because what"
                " it scores are texts; name the one that made the training data with"
                " --tokenizer-model"
            )
        tasks = read_tasks(given, limit=cfg.evaluation.eval_tasks_limit)
        tokenizer = load_tokenizer(
            data.tokenizer_type, data.tokenizer_model, eod_token=data.eod_token
        )
        check_embedding(tokenizer, cfg.model.vocab_size)
        found = encode_tasks(tasks, tokenizer, max_length=cfg.training.seq_length)
        if not num_documents:
            return found
        rows = list(found.rows)
        documents = add_documents(
            rows,
            validation,
            tokenizer,
            limit=num_documents,
            max_length=cfg.training.seq_length,
        )
        return replace(found, rows=tuple(rows), documents=documents)

    return InTraining(on_rank0("reading the tasks", read), cfg, ctx)
