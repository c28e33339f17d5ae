"""Sample the next token from its logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.trainer.errors import CheckpointError, ConfigError

TokenSampler = Callable[[Tensor], int]
"""Maps logits [v] of the next token to its id."""


def greedy_token(logits: Tensor) -> int:
    """Return the likeliest token, the lowest id among ties.

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
        temperature: divides the logits, above 0; near 0 the draw is greedy.
        top_p: probability mass to draw from, above 0; 1 draws from all tokens.
        top_k: draw only from this many likeliest tokens, at least 1; None means all. `top_p` is
            a share of their probability.
        generator: on the CPU; advanced by one draw.

    Raises:
        ConfigError: temperature, top_p or top_k is out of range.
        CheckpointError: a logit is not finite.
    """
    check_sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    finite = _finite(logits)
    ordered, ids = finite.sort(descending=True, stable=True)  # [v]
    probs = ((ordered - ordered[0]) / temperature)[:top_k].softmax(dim=0)  # [k], or [v]
    before = probs.cumsum(dim=0) - probs  # mass of likelier tokens
    nucleus = probs.masked_fill(before >= top_p, 0.0)  # never all 0
    return int(ids[torch.multinomial(nucleus, 1, generator=generator)])


def check_sampling(*, temperature: float, top_p: float, top_k: int | None = None) -> None:
    """Refuse values that define no distribution.

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


def non_finite_error(count: int, size: int) -> CheckpointError:
    """Return the error for `count` of `size` logits that are infinite or NaN."""
    return CheckpointError(
        f"{count} of {size} logits are not finite; a valid model gives finite ones,"
        " so its weights are corrupt; take an earlier checkpoint with --ckpt-step"
    )


def count_non_finite(logits: Tensor) -> int:
    """Count the logits that are infinite or NaN."""
    return int((~logits.isfinite()).sum())


def _finite(logits: Tensor) -> Tensor:
    """Return the logits [v] in fp64 on the CPU, refusing non-finite ones."""
    values = logits.detach().to("cpu", torch.float64)
    broken = count_non_finite(values)
    if broken:
        raise non_finite_error(broken, values.numel())
    return values
