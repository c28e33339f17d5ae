"""Fuses output layer and cross-entropy: logits exist for a chunk of tokens at a time.

Logits [t, v] are the largest activation of a small model, and a cross-entropy passes over them
about ten times. Here a chunk's logits are computed, turned into probabilities and then into
gradients while they are in cache, and freed.

The gradient of a loss is a product with the gradient of its logits, which is known up to the factor
that backward brings. So the forward pass computes the gradients of sum_i w_i loss_i for given
weights w, with the three matrix products that are needed in any case, and backward multiplies them
by its factor. Without given weights there is a fourth product: backward recomputes the logits. Both
are exact.

Where a kernel takes the logits (`moe_ext/kernels/cross_entropy.py`), it makes their gradient in one
pass instead of the eight of torch's functions, over TP in two with the all-reduces between them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.functional import check_on_device
from moe_ext.kernels import fused
from moe_ext.kernels.fused import FusedKernels
from moe_ext.layers.gradients import accumulation_buffer, mark_added
from moe_ext.layers.products import add_product, multiply, working_dtype

_CHUNK_NUMBERS = {"cpu": 2**25, "cuda": 2**27}
"""How many logits there are at a time. Each chunk reads and writes the weight's gradient."""
_BLOCK_NUMBERS = 2**18
"""How many logits element-wise passes take at a time on a CPU: 1 MiB, which caches hold."""


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """Says which rows of the output layer a tensor parallel rank has."""

    first: int
    """Token id of the first row."""
    number: int
    """Rows that are token ids; rows from there on are padding and take no part."""
    num_token_ids: int
    """Token ids of the whole vocabulary."""
    group: dist.ProcessGroup
    """The ranks that have the other rows."""


def tokens_per_chunk(num_tokens: int, num_rows: int, device_type: str) -> int:
    """Returns how many tokens' logits exist at a time, at least 1; the last chunk may be smaller.

    Args:
        num_tokens: t.
        num_rows: of the output layer on this rank, at least 1.
        device_type: "cpu" or "cuda".
    """
    num_chunks = max(1, -(-num_tokens * num_rows // _CHUNK_NUMBERS[device_type]))
    return max(1, -(-num_tokens // num_chunks))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    *,
    part: VocabularyPart,
    fused_kernels: FusedKernels = "auto",
) -> Tensor:
    """Computes the cross-entropy of softmax(W x) and labels, without all logits at once.

    Differentiable once, in `hidden` and `weight`. On each rank of the group the gradient of
    `hidden` is the addend of that rank's rows: sum over the group for the whole.

    Args:
        hidden: [t, h], the same on every rank of the group.
        weight: [v of this rank, h].
        labels: [t] int64 token ids.
        token_weights: [t] of any dtype, a multiple of which the losses' gradients will be; None if
            that is not known yet.
        part: of the vocabulary, what this rank has.
        fused_kernels: whether kernels may compute on the logits; the same on all ranks.

    Returns:
        [t] losses in nats, at least fp32, the same on every rank of the group; infinite for a label
        that is no token id, unless its weight is 0.

    Raises:
        ValueError: in backward, the losses' gradients are no multiple of `token_weights`; on a GPU
            a device-side assertion instead, because nothing waits for the answer.
    """
    if not torch.is_grad_enabled():
        token_weights = None  # no gradient will be asked for, so none is computed
    if token_weights is not None:
        token_weights = token_weights.to(torch.promote_types(hidden.dtype, torch.float32))
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, token_weights, part, fused_kernels
    )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        part: VocabularyPart,
        fused_kernels: FusedKernels,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        has_weights = token_weights is not None
        work = _Head(hidden, weight, labels, part, fused_kernels)
        losses = work.run(
            token_weights,
            wants_hidden=needs_hidden and has_weights,
            wants_weight=needs_weight and has_weights,
        )
        kept = (token_weights, work.grad_hidden, work.grad_weight)
        ctx.save_for_backward(hidden, weight, labels, *kept)  # type: ignore[arg-type]
        ctx.others = part, fused_kernels  # type: ignore[attr-defined]
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, token_weights, grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        buffer = accumulation_buffer(weight) if needs_weight else None
        if token_weights is None:
            work = _Head(hidden, weight, labels, *ctx.others)  # type: ignore[attr-defined]
            work.run(grad, wants_hidden=needs_hidden, wants_weight=needs_weight, buffer=buffer)
            grad_hidden, grad_weight = work.grad_hidden, work.grad_weight
        else:
            factor = _common_factor(grad, token_weights)
            grad_hidden = None if grad_hidden is None else grad_hidden * factor
            if buffer is not None:
                buffer.addcmul_(grad_weight, factor)
            elif grad_weight is not None:
                grad_weight = grad_weight * factor
        if buffer is not None:
            grad_weight = mark_added(weight)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


class _Head:
    """Computes losses and gradients of one batch of tokens.

    Args:
        hidden: [t, h].
        weight: [v of this rank, h].
        labels: [t].
        part: what this rank has.
        fused_kernels: whether kernels may compute on the logits.
    """

    grad_hidden: Tensor | None = None
    """[t, h], at least fp32; this rank's addend."""
    grad_weight: Tensor | None = None
    """[v of this rank, h], at least fp32."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        part: VocabularyPart,
        fused_kernels: FusedKernels,
    ) -> None:
        self._fused_kernels = fused_kernels
        self._hidden, self._shape, self._labels, self._part = hidden, weight.shape, labels, part
        self._work = working_dtype(hidden)
        self._exact = torch.promote_types(hidden.dtype, torch.float32)
        self._rows = weight[: part.number].to(self._work)  # [real rows, h]
        self._is_new = False

    def run(
        self,
        token_weights: Tensor | None,
        *,
        wants_hidden: bool,
        wants_weight: bool,
        buffer: Tensor | None = None,
    ) -> Tensor:
        """Computes losses [t], and the gradients that are needed of their weighted sum.

        Args:
            token_weights: [t]; None if no gradient is wanted.
            wants_hidden: make `grad_hidden`.
            wants_weight: make `grad_weight`.
            buffer: [v of this rank, h] to add the weight's gradient to, instead of making one.
        """
        if wants_hidden:
            self.grad_hidden = torch.empty_like(self._hidden, dtype=self._exact)
        if wants_weight:
            self.grad_weight = buffer
            if buffer is None:
                self.grad_weight = self._rows.new_empty(self._shape, dtype=self._exact)
                self.grad_weight[self._part.number if len(self._hidden) else 0 :] = 0.0
                self._is_new = True
        # Padding rows are counted, so that every rank of the group makes as many chunks.
        number, rows = len(self._hidden), self._shape[0]
        losses = torch.empty(number, dtype=self._exact, device=self._hidden.device)
        if number == 0:
            return losses
        size = tokens_per_chunk(number, rows, self._hidden.device.type)
        for start in range(0, number, size):
            chunk = slice(start, start + size)
            losses[chunk] = self._run_chunk(chunk, token_weights)
        return losses

    def _run_chunk(self, chunk: slice, token_weights: Tensor | None) -> Tensor:
        """Computes losses [c] of a chunk and writes its part of the gradients."""
        tokens = self._hidden[chunk].to(self._work)  # [c, h]
        uses_kernels = self._part.number > 0 and fused.takes(self._fused_kernels, tokens)
        logits = self._logits(tokens, is_dense=uses_kernels)  # [c, real rows]
        weights = None if token_weights is None else token_weights[chunk].to(self._exact)
        if uses_kernels:
            total, largest, target = self._run_kernels(chunk, logits, tokens, weights)
        else:
            total, largest, target = self._run_passes(chunk, logits, tokens, weights)
        if self.grad_hidden is not None and not self._part.number:
            self.grad_hidden[chunk] = 0.0
        losses: Tensor = total.log() + largest - target
        labels = self._labels[chunk]
        is_lost = (labels < 0) | (labels >= self._part.num_token_ids)
        if token_weights is not None:
            is_lost &= token_weights[chunk] != 0
        return losses.masked_fill_(is_lost, torch.inf)

    def _logits(self, tokens: Tensor, *, is_dense: bool) -> Tensor:
        """Computes logits [c, real rows]; on a CPU a token's are a column in memory.

        There the large matrix is the left operand as it lies, which products need no copy of, and
        so are the logits in the product that makes the weight's gradient.

        Args:
            tokens: [c, h].
            is_dense: a token's logits must be a row in memory.
        """
        if is_dense or tokens.is_cuda:
            return tokens @ self._rows.T
        return (self._rows @ tokens.T).T

    def _run_passes(
        self, chunk: slice, logits: Tensor, tokens: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes [c] sums of exp(z - largest), the largest z, and the labels' z, with torch."""
        largest = self._largest(logits)  # [c]
        places, is_here = self._places(chunk)
        found = self._part.number > 0
        place = logits.gather(1, places).squeeze(1).to(self._exact) if found else largest  # [c]
        sums = torch.stack([_exponentials_(logits, largest), largest.new_zeros(len(largest))])
        sums[1] += place * is_here if found else 0.0
        if self._part.group.size() > 1:
            dist.all_reduce(sums, group=self._part.group)  # sum over the vocabulary's ranks
        total, target = sums  # [c] each
        if weights is not None and found:
            # exp(z - max) - total at the label is `total` times the gradient of the loss.
            at_label = (place - largest).exp_() - total * is_here
            logits.scatter_(1, places, at_label.unsqueeze(1).to(logits.dtype))
            scale = (weights / total).unsqueeze(1)  # [c, 1]
            self._add_gradients(chunk, logits, tokens, scale)
        return total, largest, target

    def _run_kernels(
        self, chunk: slice, logits: Tensor, tokens: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the same in kernels, which write the gradient over the logits."""
        from moe_ext.kernels.cross_entropy import softmax_gradient_, softmax_statistics

        labels = self._labels[chunk] - self._part.first
        if weights is not None:
            weights = weights.contiguous()  # A sum's gradient is one number, expanded.
        is_whole = self._part.group.size() == 1
        own_largest, total, target = softmax_statistics(
            logits, labels, weights if is_whole else None
        )
        largest = own_largest
        if not is_whole:
            largest = own_largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._part.group)
            sums = torch.stack([total * (own_largest - largest).exp(), target])
            dist.all_reduce(sums, group=self._part.group)  # sum over the vocabulary's ranks
            total, target = sums
            if weights is not None:
                softmax_gradient_(logits, labels, weights, largest, total)
        if weights is not None and self.grad_hidden is not None:
            multiply(logits, self._rows, self.grad_hidden[chunk])
        if weights is not None and self.grad_weight is not None:
            self._add_weight_gradient(logits, tokens)
        return total, largest, target

    def _add_gradients(self, chunk: slice, grad: Tensor, tokens: Tensor, scale: Tensor) -> None:
        """Adds gradients from grad [c, real rows], which lacks the factor scale [c, 1]."""
        if self.grad_hidden is not None:
            torch.mul(grad @ self._rows, scale, out=self.grad_hidden[chunk])
        if self.grad_weight is not None:
            scaled = (tokens * scale).to(self._work)  # [c, h]
            self._add_weight_gradient(grad, scaled)

    def _add_weight_gradient(self, grad: Tensor, tokens: Tensor) -> None:
        """Adds grad^T tokens to `grad_weight`, from grad [c, real rows] and tokens [c, h]."""
        assert self.grad_weight is not None
        add = multiply if self._is_new else add_product
        add(grad.T, tokens, self.grad_weight[: self._part.number])
        self._is_new = False

    def _places(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Finds the labels' rows on this rank [c, 1], and whether they are here [c] (1 or 0)."""
        places = self._labels[chunk] - self._part.first
        is_here = (places >= 0) & (places < self._part.number)
        return places.where(is_here, 0).unsqueeze(1), is_here.to(self._exact)

    def _largest(self, logits: Tensor) -> Tensor:
        """Sums [c] over the tensor parallel ranks."""
        if self._part.number:
            largest = logits.amax(dim=1).to(self._exact)
        else:
            largest = logits.new_full((len(logits),), -torch.inf, dtype=self._exact)
        if self._part.group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._part.group)
        return largest


def _exponentials_(logits: Tensor, largest: Tensor) -> Tensor:
    """Turns logits [c, v] into exp(logits - largest [c]) in place; returns the sums over v [c].

    Sums are of largest's dtype, and so is what is summed, before it is rounded to that of logits.
    """
    column, total = largest.unsqueeze(1), torch.zeros_like(largest)
    number = logits.shape[1] if logits.is_cuda else _BLOCK_NUMBERS // max(1, len(logits))
    for part in logits.split(max(1, number), dim=1):
        exact = part.to(largest.dtype)  # the same memory if it is of that dtype
        total += exact.sub_(column).exp_().sum(dim=1)
        if exact.dtype != part.dtype:
            part.copy_(exact)
    return total


def _common_factor(grad: Tensor, token_weights: Tensor) -> Tensor:
    """Computes [] c such that grad [t] = c token_weights [t].

    Raises:
        ValueError: there is none.
    """
    if len(grad) == 0:
        return grad.new_zeros(())
    place = token_weights.abs().argmax()
    weight = token_weights[place]
    factor = torch.where(weight == 0, 0.0, grad[place] / weight)
    multiple = factor * token_weights
    # A few roundings; NaN passes, for the trainer to find in the loss.
    differs = ((grad - multiple).abs() > 8 * torch.finfo(grad.dtype).eps * multiple.abs()).any()
    check_on_device(
        ~differs,
        "the gradients of the losses are no multiple of the token weights they were announced with;"
        " give the model the loss_mask that the losses are multiplied with, or none",
    )
    return factor
