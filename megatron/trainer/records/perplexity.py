"""Finds perplexity and bits per byte of validation sets in the records of evaluations."""

from collections.abc import Sequence

from megatron.trainer.records.losses import BITS_PER_BYTE, PERPLEXITY
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.tasks import DOCUMENTS, numbers_of

_METRICS = "valid_metrics"
_OVER = {_METRICS: "tokens", DOCUMENTS: "documents"}
"""Names in a record of figures by set, and what the mean is over."""


def figures_of(record: Record, figure: str) -> dict[str, float]:
    """Return a figure of an evaluation as `SET (tokens)` and `SET (documents)`.

    Args:
        record: of the evaluation.
        figure: `perplexity` or `bits_per_byte`.
    """
    ending = f"/{figure}"
    return {
        f"{name.removesuffix(ending)} ({over})": value
        for key, over in _OVER.items()
        for name, value in numbers_of(record, key).items()
        if name.endswith(ending)
    }


def last_figures(records: Sequence[Record]) -> dict[str, tuple[float | None, float | None]]:
    """Return the last perplexity and bits per byte of each set, by name as in `figures_of`."""
    last: dict[str, tuple[float | None, float | None]] = {}
    for record in records:
        perplexities = figures_of(record, PERPLEXITY)
        bits = figures_of(record, BITS_PER_BYTE)
        for name in (*perplexities, *bits):
            last[name] = (perplexities.get(name), bits.get(name))
    return last
