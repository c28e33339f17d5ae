"""Names the losses of the stages of training, and what alignment reports, as in records."""

import math
from collections.abc import Container

LOSSES = {"lm_loss": "nats per token", "dpo_loss": "nats per pair", "kto_loss": "per answer"}
"""Maps the name of each loss to its unit; a step's record has one of them."""

PERPLEXITY = "perplexity"
"""Name in a record of exp of a validation set's loss."""
BITS_PER_BYTE = "bits_per_byte"
"""Name in a record of a validation set's bits per byte of text."""

PREFERENCES: dict[str, dict[str, str]] = {
    "rewards (beta x log-ratio)": {
        "chosen": "rewards_chosen",
        "rejected": "rewards_rejected",
        "margin": "rewards_margin",
    },
    "preferences met (share)": {"": "rewards_accuracy"},
    "log-probabilities (nats)": {"chosen": "logps_chosen", "rejected": "logps_rejected"},
    "KL (nats)": {"": "kl"},
}
"""Maps the axes of a plot of alignment to labels of curves, and these to the numbers of records."""


def loss_name(record: Container[str]) -> str | None:
    """Return the name of a record's loss; None for what is no step's record."""
    return next((name for name in LOSSES if name in record), None)


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinite where no number can hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
