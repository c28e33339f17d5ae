"""Predict and measure the first loss of an upcycled model, on real tokens."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import shut_down
from moe_app.infer import open_model
from moe_app.upcycle.dense_source import DenseSource
from moe_ext.init import weight_shards
from moe_ext.upcycling import Upcycling

_ROWS = 4
"""Windows in a forward pass."""


def read_windows(prefix: str, *, seq_length: int, num_tokens: int, vocab_size: int) -> Tensor:
    """Read the first windows of a token file: [n, s + 1] int64.

    Raises:
        DataError: the file is damaged, or has ids beyond the vocabulary.
        ConfigError: it has less than one window.
    """
    tokens = open_tokens(prefix, vocab_size=vocab_size).tokens
    count = min(len(tokens) - 1, max(num_tokens, seq_length)) // seq_length
    if count < 1:
        raise ConfigError(
            f"--data-path {prefix} has {len(tokens)} tokens; a window of the model needs"
            f" {seq_length + 1}; name a longer file"
        )
    starts = np.arange(count)[:, None] * seq_length
    return torch.from_numpy(tokens[starts + np.arange(seq_length + 1)].astype(np.int64))


def first_losses(
    source: DenseSource, saved: Path, rule: Upcycling, windows: Tensor
) -> dict[str, float]:
    """Return the losses of the dense model, as predicted, and of what was saved.

    The prediction is the dense model's loss with every feed-forward output multiplied by the sum of
    the gates that the new router gives its input; noise and new values are not in it.

    Args:
        source: the dense model.
        saved: run directory of the upcycled one.
        rule: how it was made.
        windows: [n, s + 1] int64.

    Returns:
        Mean nats a token: `dense`, `predicted`, `measured`.
    """
    args = _model_args(saved)
    found = FoundCheckpoint(path=source.path, iteration=0)
    dense = open_model.OpenedCheckpoint(found=found, saved=source.cfg)
    losses = {}
    with _loaded(args, dense, fill=lambda chunks, _: _fill(chunks, source)) as model:
        losses["dense"] = _mean_loss(model, windows)
        with _scaled_by_gates(model.module, source, rule):
            losses["predicted"] = _mean_loss(model, windows)
    upcycled = open_model.open_checkpoint(args, prog="upcycle")
    with _loaded(args, upcycled) as model:
        losses["measured"] = _mean_loss(model, windows)
    return losses


def _model_args(load: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    open_model.add_model_flags(parser)
    return parser.parse_args(["--load", str(load), "--device", "cpu"])


@contextlib.contextmanager
def _loaded(
    args: argparse.Namespace, opened: open_model.OpenedCheckpoint, **fill: Any
) -> Iterator[open_model.LoadedModel]:
    model = open_model.load_model(args, opened, **fill)
    try:
        yield model
    finally:
        shut_down(keep_world=True)


def _fill(chunks: list[nn.Module], source: DenseSource) -> None:
    """Copy the weights into a model that one rank holds."""
    for shard in weight_shards(chunks):
        if shard.data is not None:
            block = source.read(shard.key, shard.global_offset, _sizes(shard))
            shard.data.detach().copy_(block.reshape(shard.data.shape))


def _sizes(shard: Any) -> tuple[int, ...]:
    """Return the sizes of a part in its global tensor, stacked axes included."""
    return (1,) * shard.prepend_axis_num + tuple(shard.data.shape)


@contextlib.contextmanager
def _scaled_by_gates(module: nn.Module, source: DenseSource, rule: Upcycling) -> Iterator[None]:
    """Multiply feed-forward outputs by what the new routers would, in a dense model."""
    layers = [each for each in module.modules() if isinstance(each, MLP)]
    hooks = [
        layer.register_forward_hook(_scale(number, source, rule))
        for number, layer in enumerate(layers)
        if rule.makes_experts(number)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scale(number: int, source: DenseSource, rule: Upcycling) -> Callable[..., Any]:
    model = source.cfg.model
    router = rule.router(number, model.hidden_size, model.init_method_std).to(source.dtype)

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        hidden = inputs[0]  # [s, b, h]
        value, *rest = output
        scale = rule.gate_sum(hidden @ router.to(hidden.dtype).T)
        return (value * scale[..., None].to(value.dtype), *rest)

    return hook


@torch.no_grad()
def _mean_loss(model: open_model.LoadedModel, windows: Tensor) -> float:
    """Return the mean loss a token, in nats."""
    positions = torch.arange(windows.shape[1] - 1)
    total = 0.0
    for rows in windows.split(_ROWS):
        found = model.parallel.log_probs(rows[:, :-1], positions.expand(len(rows), -1), rows[:, 1:])
        assert found is not None  # one rank is the last stage
        total -= float(found.double().sum())
    return total / windows[:, 1:].numel()
