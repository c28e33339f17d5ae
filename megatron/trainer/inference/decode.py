"""Continuing prompts, a batch at a time; each token is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.trainer.inference.sampling import Choice, broken_logits, count_broken


class Decoder(Protocol):
    """A model that remembers the tokens of earlier passes, on one rank or over many."""

    def next_logits(self, tokens: Tensor, position_ids: Tensor, last: Tensor) -> Tensor | None:
        """Take in tokens, and say what may follow.

        Args:
            tokens: [b, n] int64 on the CPU.
            position_ids: [b, n] where they stand in their rows.
            last: [b] which of the n tokens the logits are wanted after.

        Returns:
            [b, v], v padded or not; None on a rank that the logits do not reach.
        """
        ...

    def share(self, values: list[int] | None, *, count: int) -> list[int]:
        """The `count` numbers of the rank that chose, on all ranks that share these prompts.

        Every rank to which `next_logits` gave logits offers values, the others None.
        """
        ...

    def most(self, values: list[int]) -> list[int]:
        """The largest of each number over all ranks of the run."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and how the text goes on from it."""

    ids: list[int]
    """Its tokens, at least one."""
    choose: Choice
    """Picks each next token; called in order on the ranks that have logits, of which one counts."""
    max_new_tokens: int
    """Most tokens to add; 0 for a row that only keeps other ranks company."""


@dataclass(kw_only=True)
class _Row:
    """How far a prompt has come."""

    prompt: Prompt
    stop_id: int
    new: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        has_stopped = bool(self.new) and self.new[-1] == self.stop_id
        return has_stopped or len(self.new) >= self.prompt.max_new_tokens

    @property
    def last_token(self) -> int:
        return self.new[-1] if self.new else self.prompt.ids[-1]

    @property
    def last_position(self) -> int:
        return len(self.prompt.ids) + len(self.new) - 1


def capacity_of(prompts: Sequence[Prompt]) -> int:
    """Positions that the longest prompt and its continuation take."""
    return max(len(prompt.ids) + prompt.max_new_tokens for prompt in prompts)


@torch.no_grad()
def generate(
    model: Decoder, prompts: Sequence[Prompt], *, stop_id: int, vocab_size: int
) -> list[list[int]]:
    """Continue prompts side by side; a collective call.

    The first pass takes in all prompts, padded on the right; then each pass takes one token of
    every row. All ranks of the run make the same number of passes, as long as any row of any rank
    is not done: with expert parallelism each pass needs everyone.

    Args:
        model: with nothing remembered yet.
        prompts: this data parallel rank's, at least one.
        stop_id: id that ends a text, such as the end of a document.
        vocab_size: ids that mean something; logits from there on belong to padding of the
            embedding and are never chosen.

    Returns:
        Each prompt's new tokens; `stop_id` is last if the text ended by itself.

    Raises:
        CheckpointError: logits are not finite; on every rank alike.
    """
    rows = [_Row(prompt=prompt, stop_id=stop_id) for prompt in prompts]
    tokens, position_ids, last = _first_pass(prompts)
    while True:
        logits = model.next_logits(tokens, position_ids, last)
        offered = None if logits is None else _choose(rows, logits[:, :vocab_size])
        *chosen, broken = model.share(offered, count=len(rows) + 1)
        for row, token in zip(rows, chosen, strict=True):
            if not row.is_done:
                row.new.append(token)
        is_open, broken = model.most([int(any(not row.is_done for row in rows)), broken])
        if broken:
            raise broken_logits(broken, vocab_size)
        if not is_open:
            return [row.new for row in rows]
        tokens = torch.tensor([[row.last_token] for row in rows])  # [b, 1]
        position_ids = torch.tensor([[row.last_position] for row in rows])  # [b, 1]
        last = torch.zeros(len(rows), dtype=torch.int64)


def _first_pass(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions [b, s] of the prompts, and where each ends, [b]."""
    lengths = [len(prompt.ids) for prompt in prompts]
    longest = max(lengths)
    tokens = torch.tensor([prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in prompts])
    position_ids = torch.arange(longest).expand(len(prompts), longest)
    return tokens, position_ids, torch.tensor(lengths) - 1


def _choose(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """A token for each row, and how many logits of the first broken row are not finite.

    Args:
        rows: b of them; those that are done get token 0.
        logits: [b, v], on the rank that chooses and on its copies.
    """
    values = logits.to("cpu", torch.float32)
    open_rows = [index for index, row in enumerate(rows) if not row.is_done]
    broken = next((count for index in open_rows if (count := count_broken(values[index]))), 0)
    chosen = [0] * len(rows)
    if not broken:
        for index in open_rows:
            chosen[index] = rows[index].prompt.choose(values[index])
    return [*chosen, broken]
