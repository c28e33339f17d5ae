"""Names the losses of the stages of training, as records have them."""

from collections.abc import Container

LOSSES = {"lm_loss": "nats per token", "dpo_loss": "nats per pair", "kto_loss": "per answer"}
"""Maps the name of each loss to its unit; a step's record has one of them."""


def loss_name(record: Container[str]) -> str | None:
    """Return the name of a record's loss; None for what is no step's record."""
    return next((name for name in LOSSES if name in record), None)
