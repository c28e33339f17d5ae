"""Describes the data of a run: the rows of the table that a run prints at its start."""

from collections.abc import Iterable

from megatron.trainer.data.build import DataBundle
from megatron.trainer.data.source import Source


def describe(
    bundle: DataBundle, *, train_samples: int | None = None
) -> list[dict[str, str | int | float | None]]:
    """Return the rows of the table a run prints at its start.

    Args:
        bundle: The run's data.
        train_samples: Samples the run will draw in all; None leaves the epochs of a phase without
            end open.

    Returns:
        One row a phase and source, training first: use (train or validation), phase, source,
        weight, documents, tokens, windows, draw (samples to be drawn), epochs. None where a figure
        does not exist: weight and epochs of a validation set, everything countable of random
        tokens, the phase of a run that has only one.
    """
    stream = bundle.train
    sources = {source.name: source for source in stream.sources}
    rows: list[dict[str, str | int | float | None]] = []
    for index, phase in enumerate(stream.phases):
        samples = train_samples if phase.num_samples is None else phase.num_samples
        for name, weight in zip(phase.sources, stream.shares(index), strict=True):
            row = _row("train", name, sources[name])
            draw = None if samples is None else samples * weight
            windows = sources[name].num_windows
            epochs = None if draw is None or windows is None else draw / windows
            row |= {"phase": phase.name, "weight": weight, "draw": draw, "epochs": epochs}
            rows.append(row)
    for name, valid in bundle.validation.items():
        rows.append(_row("validation", name, valid.source))
    return rows


def repeated_sources(rows: Iterable[dict[str, str | int | float | None]]) -> list[str]:
    """Return a line for each source of which a run draws more samples than there are."""
    drawn: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if isinstance(row["epochs"], float):
            part = (str(row["phase"]), row["epochs"])
            drawn.setdefault(str(row["source"]), []).append(part)
    lines = []
    for name, parts in drawn.items():
        total = sum(epochs for _, epochs in parts)
        if total > 1.0:
            told = ", ".join(f"{phase} {epochs:.3g}" for phase, epochs in parts)
            lines.append(
                f"source {name} is shorter than its budget: the run draws it {total:.3g} times over"
                + (f" ({told})" if len(parts) > 1 else "")
            )
    return lines


def _row(use: str, name: str, source: Source) -> dict[str, str | int | float | None]:
    """Return one row of `describe`, of a source that is not drawn from."""
    return {
        "use": use,
        "phase": None,
        "source": name,
        "weight": None,
        "documents": source.num_documents,
        "tokens": source.num_tokens,
        "windows": source.num_windows,
        "draw": None,
        "epochs": None,
    }
