"""Compute requests on all ranks: rank 0 hands them out, the others serve it.

The harness runs on rank 0 alone, so that tasks are read once and no rank can fall out of step. The
others wait for its requests in a group of their own, in which waiting has no timeout worth the
name: between requests the harness may build prompts or compute metrics for minutes.
"""

import datetime
import functools
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import CheckpointError
from megatron.trainer.inference.decode import Prompt
from megatron.trainer.inference.sampling import greedy_token, next_token
from megatron.trainer.inference.scoring import Continuation, score, score_continuations
from moe_app.infer.generate import generate_round
from moe_app.infer.open_model import LoadedModel
from moe_app.infer.score import gather_on_rank_0
from moe_app.infer.stop import Stops

logger = logging.getLogger("evaluate")

_WAIT = datetime.timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """Asks for the log-probabilities of continuations, and whether they are greedy."""

    requests: Mapping[int, Continuation]
    """By number."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Asks for the log-probabilities of long continuations alone, which take less memory."""

    requests: Mapping[int, Continuation]
    """By number."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how a prompt is continued."""

    max_new_tokens: int
    """Limit of the continuation."""
    stops: tuple[str, ...]
    """Texts that end it."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Likeliest tokens to draw from, by their probability together."""
    top_k: int | None = None
    """Likeliest tokens to draw from, by number."""


@dataclass(frozen=True, kw_only=True)
class Generations:
    """Asks for continuations of prompts."""

    prompts: Mapping[int, tuple[Sequence[int], Sampling, int]]
    """Ids, how to continue, and the seed, by number."""


Work = Continuations | Texts | Generations


class Workers:
    """Hands work of rank 0 to all ranks.

    Args:
        loaded: the model.
        tokenizer: of the model.
        stop_ids: ids that end a text.
        tokens_per_batch: of a forward pass of one data parallel rank.
        batch_size: prompts continued side by side by one data parallel rank.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        *,
        stop_ids: Mapping[int, str],
        tokens_per_batch: int,
        batch_size: int,
    ) -> None:
        self._loaded = loaded
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._tokens_per_batch = tokens_per_batch
        self._batch_size = batch_size
        self._group = dist.new_group(backend="gloo", timeout=_WAIT)

    def close(self) -> None:
        """Let the other ranks go on; called on rank 0."""
        self._send(None)

    def serve(self) -> None:
        """Compute what rank 0 asks for until it closes; called on every other rank."""
        while (work := self._send(None)) is not None:
            self._compute(work)

    def continuations(self, requests: Mapping[int, Continuation]) -> dict[int, tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is greedy.

        Raises:
            CheckpointError: one is not finite.
        """
        found = self._run(Continuations(requests=requests))
        _check_finite(value for value, _ in found.values())
        return found

    def texts(self, requests: Mapping[int, Continuation]) -> dict[int, float]:
        """Return the log-probability of each continuation.

        Raises:
            CheckpointError: one is not finite.
        """
        found = self._run(Texts(requests=requests))
        _check_finite(found.values())
        return found

    def generations(
        self, prompts: Mapping[int, tuple[Sequence[int], Sampling, int]]
    ) -> dict[int, list[int]]:
        """Return the new tokens of each prompt."""
        return self._run(Generations(prompts=prompts))

    @property
    def stop_ids(self) -> Collection[int]:
        """Return the ids that end a text."""
        return self._stop_ids.keys()

    @property
    def prompts_per_round(self) -> int:
        """Return how many prompts all ranks continue side by side."""
        return self._batch_size * self._loaded.ctx.layout.data

    @property
    def tokens_per_round(self) -> int:
        """Return how many tokens all ranks compute side by side."""
        return self._tokens_per_batch * self._loaded.ctx.layout.data

    def _run(self, work: Work) -> dict:
        self._send(work)
        return self._compute(work)

    def _send(self, work: Work | None) -> Work | None:
        """Return rank 0's work on every rank."""
        box = [work]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def _compute(self, work: Work) -> dict:
        ctx = self._loaded.ctx
        share = {
            "tokens_per_batch": self._tokens_per_batch,
            "data_parallel_rank": ctx.data_parallel_rank,
            "data_parallel_size": ctx.layout.data,
        }
        if isinstance(work, Continuations):
            scored = score_continuations(self._loaded.parallel, work.requests, **share)
            return gather_on_rank_0(scored)
        if isinstance(work, Texts):
            rows = {number: each.ids for number, each in work.requests.items()}
            found = gather_on_rank_0(score(self._loaded.parallel, rows, **share))
            return {
                number: math.fsum(found[number][-each.count :])
                for number, each in work.requests.items()
                if number in found
            }
        return self._generate(work)

    def _generate(self, work: Generations) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        numbers = list(work.prompts)
        for start in range(0, len(numbers), self.prompts_per_round):
            some = numbers[start : start + self.prompts_per_round]
            new = generate_round(
                self._loaded,
                [self._prompt(*work.prompts[number]) for number in some],
                stop_ids=self._stop_ids.keys(),
                vocab_size=self._tokenizer.vocab_size,
            )
            found.update(zip(some, new, strict=True))
        return found

    def _prompt(self, ids: Sequence[int], sampling: Sampling, seed: int) -> Prompt:
        sample = greedy_token
        if sampling.temperature > 0:
            sample = functools.partial(
                next_token,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                generator=torch.Generator().manual_seed(seed),
            )
        stops = Stops(ids=self._stop_ids, texts=sampling.stops, tokenizer=self._tokenizer)
        ends = functools.partial(stops.ends, list(ids)) if sampling.stops else None
        return Prompt(
            ids=list(ids), sample=sample, max_new_tokens=sampling.max_new_tokens, ends=ends
        )


def _check_finite(log_probs: Iterable[float]) -> None:
    """Refuse scores from which the harness would choose answers all the same."""
    for value in log_probs:
        if not math.isfinite(value):
            raise CheckpointError(
                f"the model gives a log-probability of {value}; a valid model gives finite ones;"
                " load a checkpoint from before the weights diverged (--ckpt-step)"
            )
