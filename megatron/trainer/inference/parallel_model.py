"""Run a forward pass over all ranks of a model: no gradients, no micro-batch schedule."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.trainer.runtime.launch import RunContext

_MOST_LOGITS = 1 << 22
"""Numbers that `likeliest` lets the head compute at a time: 16 MiB of fp32."""
_LEAST_HEAD_ROWS = 64
"""Positions that are worth a matrix product, however large the vocabulary."""


class ParallelModel:
    """Runs forward passes of this rank's part of a model together with the other ranks.

    A pipeline stage receives hidden states from the previous stage and sends its own to the next,
    so several passes can be in flight, each in another stage. The last stage has the results.
    Tensor parallel ranks hold the same results. Data parallel ranks may pass batches of different
    shapes, but under expert parallelism all must make the same number of passes.

    Args:
        model: this rank's chunk in evaluation mode, built without sequence parallelism.
        ctx: this rank's context.
        vocab_size: rows of the vocabulary that are not padding.
    """

    def __init__(self, model: nn.Module, ctx: RunContext, *, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self._device = ctx.device
        self._pp = ctx.groups.pp
        self._tp = ctx.groups.tp
        self._mp = ctx.groups.mp
        self.is_last = self._pp.rank() == self._pp.size() - 1

    @property
    def is_output_rank(self) -> bool:
        """Return whether this rank returns the results of the ranks that share a batch."""
        return self.is_last and self._tp.rank() == 0

    def next_logits(self, tokens: Tensor, position_ids: Tensor, last: Tensor) -> Tensor | None:
        """Compute logits after one token of each row only.

        Args:
            tokens: [b, n] int64.
            position_ids: [b, n] int64.
            last: [b] which of the n tokens.

        Returns:
            [b, padded v] on the last stage, None before it.
        """
        rows = torch.arange(len(last), device=self._device)
        at = last.to(self._device)

        def keep_last(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]  # [n, b, h]
            return hidden[at, rows][None], *args[1:]  # [1, b, h]

        with self._before_output_layer(keep_last):
            output = self._forward(tokens, position_ids, runtime_gather_output=True)
        return None if output is None else output[:, 0]  # [b, padded v]

    def logits(self, tokens: Tensor, position_ids: Tensor) -> Tensor | None:
        """Return logits [b, n, v] of all tokens [b, n] on the last stage, None before it."""
        output = self._forward(tokens, position_ids, runtime_gather_output=True)
        return None if output is None else output[..., : self.vocab_size]

    def likeliest(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the likeliest token after each of a batch, and its logit.

        The head runs over a part of the positions at a time: logits of a whole batch would be the
        largest tensor of a pass by far.

        Args:
            tokens: [b, n] int64.
            position_ids: [b, n] int64.

        Returns:
            [b, n] int64 ids, the lowest among equals, and [b, n] fp32 logits, NaN where any of a
            position's is NaN, both on the CPU on the last stage; None before it.
        """
        kept: dict[str, Any] = {}

        def keep(
            _module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept.update(hidden=args[0], options=options)
            return (args[0][:1, :1], *args[1:]), options  # [1, 1, h]; its logits are not used

        with self._before_output_layer(keep, with_kwargs=True):
            output = self._forward(tokens, position_ids, runtime_gather_output=True)
        if output is None:
            return None
        ids, values = self._likeliest_of(kept["hidden"], kept["options"])  # [n, b]
        return ids.T.contiguous(), values.T.contiguous()

    @torch.no_grad()
    def _likeliest_of(self, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return ids and logits of the likeliest tokens [n, b] after hidden states [n, b, h]."""
        head = cast(nn.Module, self.model.output_layer)
        rows = max(_LEAST_HEAD_ROWS, _MOST_LOGITS // self.vocab_size)
        found: list[tuple[Tensor, Tensor]] = []
        for part in hidden.flatten(0, 1).split(rows):
            logits, _ = head(part[None], **options)  # [1, rows, padded v]
            found.append(_largest(logits[0, :, : self.vocab_size]))
        ids, values = (torch.cat(each).view(hidden.shape[:2]) for each in zip(*found, strict=True))
        return ids, values

    def log_probs(self, tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor | None:
        """Return natural-log probabilities of labels.

        Args:
            tokens: [b, n] int64.
            position_ids: [b, n] int64.
            labels: [b, n] int64, the token after each.

        Returns:
            [b, n] fp32 on the last stage, None before it.
        """
        losses = self._forward(tokens, position_ids, labels=labels.to(self._device))
        return None if losses is None else -losses.float()

    def picked_log_probs(
        self, tokens: Tensor, position_ids: Tensor, picked: tuple[Tensor, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return natural-log probabilities of tokens after some positions only.

        Args:
            tokens: [b, n] int64.
            position_ids: [b, n] int64.
            picked: row and column of each position, [m] int64 both.
            labels: [m] int64, the token after each.

        Returns:
            [m] fp32 log-probabilities, and [m] bool whether the label is the likeliest token, on
            the last stage; None before it.
        """
        rows, columns = (each.to(self._device) for each in picked)

        def keep_picked(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]  # [n, b, h]
            return hidden[columns, rows][None], *args[1:]  # [1, m, h]

        with self._before_output_layer(keep_picked):
            output = self._forward(tokens, position_ids, runtime_gather_output=True)
        if output is None:
            return None
        logits = output[:, 0, : self.vocab_size].float()  # [m, v]
        labels = labels.to(self._device)
        chosen = logits.gather(1, labels[:, None])[:, 0]
        return chosen - logits.logsumexp(dim=-1), logits.argmax(dim=-1) == labels

    def broadcast(self, values: list[int] | None, *, count: int) -> list[int]:
        """Return the output rank's `count` integers on all its tensor and pipeline ranks."""
        shared = torch.tensor(values or [0] * count, dtype=torch.int64, device=self._device)
        # Source: TP rank 0 of the last stage, in the TP x PP group.
        dist.broadcast(shared, group=self._mp, group_src=self._mp.size() - self._tp.size())
        return [int(value) for value in shared.tolist()]

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """Return the maximum of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # over the world
        return [int(value) for value in largest.tolist()]

    @contextlib.contextmanager
    def _before_output_layer(
        self, hook: Callable[..., Any], *, with_kwargs: bool = False
    ) -> Iterator[None]:
        """Install a pre-forward hook on the output layer of the last stage within the context."""
        if not self.is_last:
            yield
            return
        handle = cast(nn.Module, self.model.output_layer).register_forward_pre_hook(
            hook, with_kwargs=with_kwargs
        )
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _forward(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> Tensor | None:
        """Run this stage's part of a pass; return its output on the last stage, None before it."""
        stage, config = self._pp.rank(), cast(Any, self.model).config
        if stage > 0:
            hidden = torch.empty(
                tokens.shape[1],
                tokens.shape[0],
                config.hidden_size,
                dtype=config.params_dtype,
                device=self._device,
            )  # [n, b, h]
            dist.recv(hidden, group=self._pp, group_src=stage - 1)
            cast(Any, self.model).set_input_tensor(hidden)
        output: Tensor = self.model(
            tokens.to(self._device), position_ids.to(self._device), None, **options
        )
        if self.is_last:
            return output
        dist.send(output.contiguous(), group=self._pp, group_dst=stage + 1)
        return None


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and value of the largest logit of each row [m, v], on the CPU."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # NumPy's is several times as fast as torch's on a CPU, and treats NaN alike.
        ids = torch.from_numpy(logits.numpy().argmax(axis=1))
        return ids, logits.gather(1, ids[:, None])[:, 0]
    best = logits.max(dim=1)
    return best.indices.cpu(), best.values.float().cpu()
