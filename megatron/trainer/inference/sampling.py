"""The choice of the next token from its logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.trainer.errors import CheckpointError, ConfigError

Choice = Callable[[Tensor], int]
"""Logits [v] of the next token to its id."""


def greedy_token(logits: Tensor) -> int:
    """The likeliest token, the first of several that are equally likely.

    Args:
        logits: [v] any floating dtype, all finite.

    Raises:
        CheckpointError: a logit is not finite.
    """
    return int(_finite(logits).argmax())


def next_token(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int | None = None,
    generator: torch.Generator,
) -> int:
    """Draw a token from the nucleus: the fewest likeliest tokens that together reach `top_p`.

    Computed in fp64 on the CPU, so that the draw depends on logits and generator alone. Source:
    Holtzman, Buys, Du, Forbes and Choi, "The Curious Case of Neural Text Degeneration" (2020),
    section 3.1.

    Args:
        logits: [v] any floating dtype, all finite.
        temperature: divides the logits, above 0; towards 0 the likeliest token is certain.
        top_p: probability mass to draw from, above 0; 1 draws from all tokens.
        top_k: only so many of the likeliest tokens have any probability, at least 1; None means
            all. `top_p` is a share of what these have.
        generator: of the CPU; advanced by one draw.

    Raises:
        ConfigError: temperature, top_p or top_k is out of range.
        CheckpointError: a logit is not finite.
    """
    check_sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    finite = _finite(logits)
    ordered, ids = finite.sort(descending=True, stable=True)  # [v]
    probs = ((ordered - ordered[0]) / temperature)[:top_k].softmax(dim=0)  # [k], or [v]
    before = probs.cumsum(dim=0) - probs  # mass of the tokens that are likelier
    nucleus = probs.masked_fill(before >= top_p, 0.0)  # never all 0
    return int(ids[torch.multinomial(nucleus, 1, generator=generator)])


def check_sampling(*, temperature: float, top_p: float, top_k: int | None = None) -> None:
    """Refuse values that no distribution follows from.

    Raises:
        ConfigError: temperature is not a finite number above 0, top_p not in (0, 1], or top_k
            below 1.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(
            f"--temperature is {temperature}; it must be a finite number above 0; use 0.8, for"
            " example, or --greedy for the likeliest token each time"
        )
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(
            f"--top-p is {top_p}; it must be above 0 and at most 1; use 0.95, for example, or 1 to"
            " draw from all tokens"
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(
            f"--top-k is {top_k}; it must be at least 1; use 50, for example, or leave it out to"
            " draw from all tokens"
        )


def broken_logits(count: int, size: int) -> CheckpointError:
    """The error for `count` of `size` logits that are infinite or not a number."""
    return CheckpointError(
        f"{count} of {size} logits are not finite; a sound model gives finite ones,"
        " so its weights are broken; take an earlier checkpoint with --ckpt-step"
    )


def count_broken(logits: Tensor) -> int:
    """How many logits are infinite or not a number."""
    return int((~logits.isfinite()).sum())


def _finite(logits: Tensor) -> Tensor:
    """The logits [v] in fp64 on the CPU."""
    values = logits.detach().to("cpu", torch.float64)
    broken = count_broken(values)
    if broken:
        raise broken_logits(broken, values.numel())
    return values
