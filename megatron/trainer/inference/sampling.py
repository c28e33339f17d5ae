"""Text from a language model, one token at a time: the choice of a token, and the loop around it.

Every token costs a full forward pass over all tokens before it; nothing is cached between them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron.trainer.errors import CheckpointError, ConfigError

Forward = Callable[[Tensor], Tensor]
"""Token ids [1, s] to logits [1, s, v], v padded or not."""
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
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token from the nucleus: the fewest likeliest tokens that together reach `top_p`.

    Computed in fp64 on the CPU, so that the draw depends on logits and generator alone. Source:
    Holtzman, Buys, Du, Forbes and Choi, "The Curious Case of Neural Text Degeneration" (2020),
    section 3.1.

    Args:
        logits: [v] any floating dtype, all finite.
        temperature: divides the logits, above 0; towards 0 the likeliest token is certain.
        top_p: probability mass to draw from, above 0; 1 draws from all tokens.
        generator: of the CPU; advanced by one draw.

    Raises:
        ConfigError: temperature or top_p is out of range.
        CheckpointError: a logit is not finite.
    """
    check_sampling(temperature=temperature, top_p=top_p)
    finite = _finite(logits)
    probs = ((finite - finite.max()) / temperature).softmax(dim=0)  # [v]
    ordered, ids = probs.sort(descending=True, stable=True)  # [v]
    before = ordered.cumsum(dim=0) - ordered  # [v], mass of the tokens that are likelier
    nucleus = ordered.masked_fill(before >= top_p, 0.0)  # [v], never all 0
    return int(ids[torch.multinomial(nucleus, 1, generator=generator)])


def check_sampling(*, temperature: float, top_p: float) -> None:
    """Refuse values that no distribution follows from.

    Raises:
        ConfigError: temperature is not a finite number above 0, or top_p not in (0, 1].
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


@torch.no_grad()
def generate(
    forward: Forward,
    prompt_ids: Sequence[int],
    choose: Choice,
    *,
    max_new_tokens: int,
    stop_id: int,
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Continue a prompt.

    Args:
        forward: the model.
        prompt_ids: at least one token.
        choose: picks each next token.
        max_new_tokens: most tokens to add.
        stop_id: id that ends the text, such as the end of a document.
        vocab_size: ids that mean something; logits from there on belong to padding of the
            embedding and are never chosen.
        device: where `forward` wants its tokens.

    Returns:
        The new tokens, without the prompt; `stop_id` is last if the text ended by itself.
    """
    tokens = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device)  # [1, s]
    new: list[int] = []
    while len(new) < max_new_tokens:
        chosen = choose(forward(tokens)[0, -1, :vocab_size])
        new.append(chosen)
        if chosen == stop_id:
            break
        tokens = torch.cat([tokens, tokens.new_tensor([[chosen]])], dim=1)  # [1, s + 1]
    return new


def _finite(logits: Tensor) -> Tensor:
    """The logits [v] in fp64 on the CPU."""
    values = logits.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{count} of {values.numel()} logits are not finite; a sound model gives finite ones,"
            " so its weights are broken; take an earlier checkpoint with --ckpt-step"
        )
    return values
