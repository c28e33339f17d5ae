"""Continue prompts in batches with a key-value cache, so that each token is computed once."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.trainer.inference.sampling import TokenSampler, count_non_finite, non_finite_error


class Decoder(Protocol):
    """Computes next-token logits with a cache of earlier tokens, on one rank or many."""

    def next_logits(self, tokens: Tensor, position_ids: Tensor, last: Tensor) -> Tensor | None:
        """Process tokens, and return the logits that follow.

        Args:
            tokens: [b, n] int64 on the CPU.
            position_ids: [b, n] positions in their rows.
            last: [b] index of the token after which logits are computed.

        Returns:
            [b, v], v padded or not; None on a rank without logits.
        """
        ...

    def broadcast(self, values: list[int] | None, *, count: int) -> list[int]:
        """Return the `count` integers of the output rank, on all ranks that share these prompts.

        Every rank to which `next_logits` gave logits passes values, the others None.
        """
        ...

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """Return the maximum of each value over all ranks of the run."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Holds a prompt, and how to continue it."""

    ids: list[int]
    """Prompt tokens, at least one."""
    sample: TokenSampler
    """Samples each next token; called in order on the ranks that have logits, one of which
    decides."""
    max_new_tokens: int
    """Maximum tokens to add; 0 for a dummy row that keeps collectives matched."""
    ends: Callable[[list[int]], bool] | None = None
    """Decides from the new tokens, on every rank alike, whether the text has ended; None never."""


@dataclass(kw_only=True)
class _Row:
    """Tracks the continuation of a prompt."""

    prompt: Prompt
    stop_ids: Collection[int]
    new: list[int] = field(default_factory=list)
    is_done: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_done = self.prompt.max_new_tokens <= 0

    def add(self, token: int) -> None:
        """Add a token, and decide whether it is the last."""
        self.new.append(token)
        self.is_done = len(self.new) >= self.prompt.max_new_tokens or token in self.stop_ids
        if not self.is_done and self.prompt.ends is not None:
            self.is_done = self.prompt.ends(self.new)

    @property
    def last_token(self) -> int:
        return self.new[-1] if self.new else self.prompt.ids[-1]

    @property
    def last_position(self) -> int:
        return len(self.prompt.ids) + len(self.new) - 1


def cache_capacity(prompts: Sequence[Prompt]) -> int:
    """Return the positions that the longest prompt and its continuation take."""
    return max(len(prompt.ids) + prompt.max_new_tokens for prompt in prompts)


@torch.no_grad()
def generate(
    model: Decoder, prompts: Sequence[Prompt], *, stop_ids: Collection[int], vocab_size: int
) -> list[list[int]]:
    """Continue a batch of prompts; a collective call.

    The first pass processes all prompts, padded on the right; each later pass processes one token
    of every row. All ranks of the run make the same number of passes, until every row of every rank
    is done, because under expert parallelism each pass is collective.

    Args:
        model: with an empty cache.
        prompts: those of this data parallel rank, at least one.
        stop_ids: ids that end a text, such as the end of a document.
        vocab_size: real token ids; logits beyond are embedding padding and never sampled.

    Returns:
        Each prompt's new tokens; one of `stop_ids` is last if it ended the text.

    Raises:
        CheckpointError: logits are not finite; on every rank alike.
    """
    rows = [_Row(prompt=prompt, stop_ids=stop_ids) for prompt in prompts]
    tokens, position_ids, last = _first_pass(prompts)
    while True:
        logits = model.next_logits(tokens, position_ids, last)
        offered = None if logits is None else _sample_tokens(rows, logits[:, :vocab_size])
        *chosen, broken = model.broadcast(offered, count=len(rows) + 1)
        for row, token in zip(rows, chosen, strict=True):
            if not row.is_done:
                row.add(token)
        is_unfinished, broken = model.all_reduce_max(
            [int(any(not row.is_done for row in rows)), broken]
        )
        if broken:
            raise non_finite_error(broken, vocab_size)
        if not is_unfinished:
            return [row.new for row in rows]
        tokens = torch.tensor([[row.last_token] for row in rows])  # [b, 1]
        position_ids = torch.tensor([[row.last_position] for row in rows])  # [b, 1]
        last = torch.zeros(len(rows), dtype=torch.int64)


def _first_pass(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and positions [b, s] of the prompts, and the last index of each, [b]."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths)
    tokens = torch.tensor([prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in prompts])
    position_ids = torch.arange(longest).expand(len(prompts), longest)
    return tokens, position_ids, torch.tensor(lengths) - 1


def _sample_tokens(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """Sample a token for each row; append the non-finite logits of the first invalid row.

    Args:
        rows: b rows; finished ones get token 0.
        logits: [b, v], on the output rank and its replicas.
    """
    values = logits.to("cpu", torch.float32)
    unfinished = [index for index, row in enumerate(rows) if not row.is_done]
    broken = next((count for index in unfinished if (count := count_non_finite(values[index]))), 0)
    chosen = [0] * len(rows)
    if not broken:
        for index in unfinished:
            chosen[index] = rows[index].prompt.sample(values[index])
    return [*chosen, broken]
