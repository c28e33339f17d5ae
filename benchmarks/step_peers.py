"""Implements training steps of whole models: the project's trainer, and transformers."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from benchmarks.digests import Digests, digest, random_tensor
from benchmarks.layer_transformers import family_name, hf_config
from benchmarks.native import start
from benchmarks.shapes import COMPARED, Shape
from benchmarks.timing import synchronize
from megatron.trainer.data.batch import Batch
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.optim.schedules import Schedule
from megatron.trainer.optim.wrap import prepare_training, wrap_model
from megatron.trainer.state import TrainState, unwrap
from megatron.trainer.step import train_step
from moe_ext.builder import build_model
from moe_ext.convert import FAMILIES, Piece
from moe_ext.convert.pieces import Slice
from moe_ext.layers.transformer import transformer_config

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
"""Hyperparameters of all implementations."""
_ROUTER_LOGIT_STD = 0.8
_STD = 0.02


class StepSubject(ABC):
    """Trains a model on consecutive batches.

    Args:
        shape: model and batch.
        device: where.
        dtype: of the matrix products.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype

    @abstractmethod
    def step(self, batch: Batch) -> float:
        """Run forward, backward, clipping and update; return the loss in nats."""

    @abstractmethod
    def loss_and_backward(self, batch: Batch) -> float:
        """Compute gradients without updating the weights; return the loss in nats."""

    @abstractmethod
    def gradient_parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield gradients under transformers' names, in the parts of `fused_pieces`."""

    def sample(self, number: int) -> Mapping[str, float]:
        """Measure `seconds` and `loss` of one step on a batch, which is made in advance."""
        batch = make_batch(self.shape, number, self.device)
        synchronize(self.device)
        started = time.perf_counter()
        loss = self.step(batch)
        synchronize(self.device)
        return {"seconds": time.perf_counter() - started, "loss": loss}

    @abstractmethod
    def release(self) -> None:
        """Drop gradients that the next step does not need."""

    def check(self) -> tuple[float, Digests]:
        """Compute loss and digests of all gradients on a separate batch."""
        loss = self.loss_and_backward(make_batch(self.shape, COMPARED, self.device))
        return loss, digest(self.gradient_parts())


class TransformersStep(StepSubject):
    """Trains AutoModelForCausalLM with SDPA, its own loss, clipping and torch's fused AdamW.

    Args:
        shape: model and batch.
        device: where.
        dtype: of the matrix products.
        experts: implementation of the experts.
        has_master_weights: bf16 by autocast over fp32 weights, as the trainer's master weights are;
            otherwise weights and moments are bf16 too, which is faster, smaller and less exact.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        experts: str,
        has_master_weights: bool,
    ) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(shape, device, dtype)
        self._is_autocast = has_master_weights and dtype != torch.float32
        kept = torch.float32 if has_master_weights else dtype
        with device:
            config = hf_config(shape, kept, experts=experts)
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=kept)
        self._parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for part in _parts(shape):
                rows = self._parameters[part.name][part.start : part.start + part.count]
                rows.copy_(draw(part, device))
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON,
            weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip

    def release(self) -> None:
        """Drop all gradients, as the next step does first."""
        self._optimizer.zero_grad(set_to_none=True)

    def loss_and_backward(self, batch: Batch) -> float:
        """See `StepSubject`."""
        self.release()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_autocast):
            loss = self.loss_of(batch)
        loss.backward()
        return float(loss.detach())

    def loss_of(self, batch: Batch) -> Tensor:
        """Return [] the mean cross-entropy, with its graph."""
        loss: Tensor = self._model(
            batch.tokens, labels=batch.labels, shift_labels=batch.labels, use_cache=False
        ).loss
        return loss

    def step(self, batch: Batch) -> float:
        """See `StepSubject`."""
        loss = self.loss_and_backward(batch)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        return loss

    def gradient_parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """See `StepSubject`."""
        for part in _parts(self.shape):
            gradient = self._parameters[part.name].grad
            if gradient is None:
                raise ValueError(f"{part.name} got no gradient")
            yield part.name, part.start, gradient[part.start : part.start + part.count]


class NativeStep(StepSubject):
    """Runs the trainer's own step with megatron-core's schedule, gradient buffers and optimizer.

    Both router losses are computed and recorded as in any run; their coefficients are 0, so the
    gradient is that of the language-model loss alone, like the peers'.

    Args:
        shape: model and batch.
        device: where.
        dtype: of the matrix products; bf16 keeps fp32 master weights.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        cfg, ctx = start(
            shape.model,
            device=device,
            dtype=dtype,
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            learning_rate=LEARNING_RATE,
        )
        config = transformer_config(shape.model, bf16=cfg.training.bf16)
        built = build_model(
            shape.model, config, pg_collection=ctx.groups, seq_length=shape.seq_length, seed=None
        )
        for weight, pieces in _places(list(built.chunks), shape):
            for piece, window in pieces:
                sources = [draw(part, device) for part in piece.sources]
                with torch.no_grad():
                    target = weight[window]
                    target.copy_(piece.to_native(sources).view_as(target))
        chunks = wrap_model(cfg, list(built.chunks), config)
        self._state = TrainState(
            cfg=cfg,
            ctx=ctx,
            chunks=chunks,
            transformer_config=config,
            optimizer=prepare_training(cfg, chunks, config),
            schedule=Schedule(
                style="constant", peak=LEARNING_RATE, final=LEARNING_RATE, warmup=0,
                warmup_init=LEARNING_RATE, decay_end=1,
            ),
            train_data=GivenBatch(),  # type: ignore[arg-type]
        )  # fmt: skip

    def release(self) -> None:
        """Keep the buffers of gradients, which each step uses again."""

    def step(self, batch: Batch) -> float:
        """See `StepSubject`."""
        self._state.train_data.batch = batch  # type: ignore[attr-defined]
        return train_step(self._state, NEXT_TOKEN).loss

    def loss_and_backward(self, batch: Batch) -> float:
        """See `StepSubject`."""
        (chunk,) = self._state.chunks
        chunk.zero_grad_buffer()
        # The pipeline schedule sets it before backward; the shape must be the same.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=self.device))
        losses = chunk(
            batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask
        )
        loss = losses.float().mean()
        loss.backward()
        return float(loss.detach())

    def gradient_parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """See `StepSubject`."""
        modules = [unwrap(chunk) for chunk in self._state.chunks]
        for weight, pieces in _places(modules, self.shape):
            for piece, window in pieces:
                block = weight.main_grad[window].view(piece.block)  # type: ignore[attr-defined]
                for part, rows in zip(piece.sources, piece.to_hf(block), strict=True):
                    yield part.name, part.start, rows


class GivenBatch:
    """Replaces the stream of samples with the batch that was set for this step."""

    batch: Batch
    consumed_samples = 0
    trained_samples = (0, 0)
    seq_length = 1

    def next_global_batch(self, **_sizes: int) -> Sequence[Batch]:
        """Return the batch as the only micro-batch."""
        return [self.batch]


def make_batch(shape: Shape, number: int, device: torch.device) -> Batch:
    """Sample tokens by Zipf's law: the n-th most frequent is 1/n as frequent as the first."""
    generator = torch.Generator().manual_seed(1000 + number)
    size = (shape.micro_batch_size, shape.seq_length + 1)
    vocabulary = shape.model.vocab_size
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    ids = (uniform * math.log(vocabulary + 1)).exp().long() - 1  # [b, s + 1]
    ids = ids.clamp_(0, vocabulary - 1)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.shape),
        position_ids=torch.arange(shape.seq_length)[None],
    ).to(device)


def draw(part: Slice, device: torch.device) -> Tensor:
    """Sample initial fp32 weights of a part of a transformers tensor.

    Norms are around 1; router logits have the standard deviation of the released OLMoE-1B-7B; all
    other weights are normal with the papers' standard deviation.
    """
    if len(part.shape) == 1:
        is_norm = "norm" in part.name
        small = random_tensor(f"{part.name}:{part.start}", part.part_shape, std=0.1, device=device)
        return 1 + small if is_norm else small
    is_router = ".gate." in part.name or ".router." in part.name
    std = _ROUTER_LOGIT_STD * part.shape[-1] ** -0.5 if is_router else _STD
    return random_tensor(f"{part.name}:{part.start}", part.part_shape, std=std, device=device)


def fused_pieces(shape: Shape) -> Iterator[Piece]:
    """Yield the converter's pieces, under the names of transformers' modules."""
    yield from FAMILIES[family_name(shape)].pieces(shape.model, "fused")


def _parts(shape: Shape) -> Iterator[Slice]:
    for piece in fused_pieces(shape):
        yield from piece.sources


Window = tuple[int | slice, ...]


def _places(
    modules: Sequence[nn.Module], shape: Shape
) -> Iterator[tuple[nn.Parameter, list[tuple[Piece, Window]]]]:
    """Yield each weight of a one-rank model with its pieces and their position in it."""
    pieces: dict[str, list[Piece]] = {}
    for piece in fused_pieces(shape):
        if piece.sources:
            pieces.setdefault(piece.key, []).append(piece)
    weights = {weight.data_ptr(): weight for module in modules for weight in module.parameters()}
    for module in modules:
        for value in nested_values(module.sharded_state_dict()):  # type: ignore[operator]
            built = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in nested_values({"part": built}):
                if isinstance(part, ShardedTensor):
                    yield weights[part.data.data_ptr()], _within(part, pieces[part.key])


def _within(shard: ShardedTensor, pieces: Sequence[Piece]) -> list[tuple[Piece, Window]]:
    """Select the pieces of this shard's layer; the weight itself has no layer axis."""
    stacked = shard.prepend_axis_num
    layer = tuple(shard.global_offset[:stacked])
    return [
        (
            piece,
            tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.block, strict=True))[
                stacked:
            ],
        )
        for piece in pieces
        if piece.offset[:stacked] == layer
    ]


def build_native(device: torch.device, shape: Shape, dtype: torch.dtype) -> StepSubject:
    """Build the native step in a worker; the model names the expert backend."""
    return NativeStep(shape, device, dtype)


def build_transformers(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    experts: str,
    has_master_weights: bool,
) -> StepSubject:
    """Build the transformers step in a worker."""
    return TransformersStep(
        shape, device, dtype, experts=experts, has_master_weights=has_master_weights
    )
