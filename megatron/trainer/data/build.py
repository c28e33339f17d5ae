"""From a DataConfig to training samples and validation sets, everything verified first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from megatron.trainer.config import DataConfig
from megatron.trainer.data.indexed import TokenFile, open_tokens
from megatron.trainer.data.source import MockSource, Source, WindowSource
from megatron.trainer.data.stream import SampleStream, ValidationSet
from megatron.trainer.errors import ConfigError, DataError

_STEM_SUFFIX = "_text_document"


@dataclass(frozen=True)
class DataBundle:
    """All data of a run."""

    train: SampleStream
    """What the run trains on."""
    validation: dict[str, ValidationSet]
    """What it evaluates on, by name; may be empty."""


def build_data(cfg: DataConfig, *, vocab_size: int, seq_length: int, seed: int) -> DataBundle:
    """Open and verify every file the run will read, and lay out the samples.

    Args:
        cfg: Paths, blend and split.
        vocab_size: Token ids the model has an embedding for; every token is held against it.
        seq_length: Positions in a sample (s).
        seed: What the order follows from.

    Raises:
        ConfigError: Flags are missing, contradict each other or make no sense.
        DataError: A file is missing, damaged, too short or does not fit the vocabulary; or a
            blend is not written as it must be.
    """
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must be >= 0; give another one")
    if cfg.mock_data:
        return _mock_data(vocab_size=vocab_size, seq_length=seq_length, seed=seed)
    if not cfg.data_path:
        raise ConfigError(
            "neither --data-path nor --mock-data is given; a run needs one of them; name a token"
            " file's PREFIX, or train on random tokens with --mock-data"
        )
    weights, prefixes = _parse_data_path(cfg.data_path)
    train_share = _parse_split(cfg.split)
    names = unique_names(prefixes)
    common = {"seq_length": seq_length, "seed": seed, "vocab_size": vocab_size}
    train: list[Source] = []
    validation: dict[str, ValidationSet] = {}
    for index, (name, prefix) in enumerate(zip(names, prefixes, strict=True)):
        file = open_tokens(prefix, vocab_size=vocab_size)
        cut = _split_point(file, train_share)
        train.append(_window_source(file, name, (0, cut), index=index, **common))
        if cut < file.num_tokens:
            held_back = _window_source(file, name, (cut, file.num_tokens), index=index, **common)
            validation[name] = ValidationSet(name, held_back)
    for name, prefix in _parse_valid_data_path(cfg.valid_data_path).items():
        if name in validation:
            raise ConfigError(
                f"--valid-data-path names a set {name!r}, and --split {cfg.split} holds one back"
                " under that name; names must differ; rename it"
            )
        file = open_tokens(prefix, vocab_size=vocab_size)
        whole = _window_source(file, name, (0, file.num_tokens), index=0, **common)
        validation[name] = ValidationSet(name, whole)
    stream = SampleStream(train, weights, seq_length=seq_length, seed=seed)
    return DataBundle(stream, validation)


def describe(
    bundle: DataBundle, *, train_samples: int | None = None
) -> list[dict[str, str | int | float | None]]:
    """Return the rows of the table a run prints at its start.

    Args:
        bundle: The run's data.
        train_samples: Samples the run will draw in all; None leaves epochs open.

    Returns:
        One row a source, training first: use (train or validation), source, weight, documents,
        tokens, windows, epochs. None where a figure does not exist: weight and epochs of a
        validation set, everything countable of random tokens.
    """
    rows: list[dict[str, str | int | float | None]] = []
    for source, weight in zip(bundle.train.sources, bundle.train.weights, strict=True):
        epochs = None
        if train_samples is not None and source.num_windows is not None:
            epochs = train_samples * weight / source.num_windows
        rows.append(_row("train", source.name, source, weight, epochs))
    for name, valid in bundle.validation.items():
        rows.append(_row("validation", name, valid.source, None, None))
    return rows


def unique_names(prefixes: Sequence[str]) -> list[str]:
    """Name each prefix by its stem, with as many parent folders as make all names differ.

    Args:
        prefixes: Paths without .bin and .idx.

    Returns:
        Names in the same order: `a/x_text_document` is `x`, or `a/x` beside `b/x_text_document`.

    Raises:
        DataError: A prefix is given twice.
    """
    paths = [PurePath(prefix) for prefix in prefixes]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(
                f"--data-path names {path} {paths.count(path)} times; each file must be named once;"
                " add up its weights"
            )
    parts = [(*path.parent.parts, path.name.removesuffix(_STEM_SUFFIX)) for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        if depth > max(len(part) for part in parts):
            raise DataError(
                f"--data-path names {' and '.join(prefixes)}, which differ only by {_STEM_SUFFIX};"
                " names must differ without it; rename one"
            )
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _mock_data(*, vocab_size: int, seq_length: int, seed: int) -> DataBundle:
    """Return random tokens to train on, and one validation set of others.

    The flag stands above a recipe's files, so that any recipe can be tried without its data.
    """
    source = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed)
    other = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed + 1)
    stream = SampleStream([source], [1.0], seq_length=seq_length, seed=seed)
    return DataBundle(stream, {other.name: ValidationSet(other.name, other)})


def _parse_data_path(data_path: Sequence[str]) -> tuple[list[float], list[str]]:
    """Return weights and prefixes of one PREFIX or of WEIGHT PREFIX pairs."""
    rule = "--data-path must be one PREFIX, or WEIGHT PREFIX pairs with weights > 0"
    if len(data_path) == 1:
        return [1.0], [data_path[0]]
    given = " ".join(data_path)
    if len(data_path) % 2:
        raise DataError(
            f"--data-path has {len(data_path)} parts ({given}); {rule}; give each file a weight"
        )
    weights = []
    for part in data_path[::2]:
        weight = _number(part)
        if weight is None or weight <= 0:
            raise DataError(
                f"--data-path has {part!r} where a weight belongs ({given}); {rule}; give each file"
                " a weight, or leave it out"
            )
        weights.append(weight)
    return weights, list(data_path[1::2])


def _parse_split(split: str) -> float:
    """Return the training share, 0 to 1, of a split such as 99,1."""
    shares = [_number(part) for part in split.split(",")]
    if len(shares) == 2 and shares[0] is not None and shares[1] is not None:
        train, valid = shares[0], shares[1]
        if train > 0 and valid >= 0:
            return 1.0 / (1.0 + valid / train)
    raise ConfigError(
        f"--split is {split!r}; it must be two numbers, training > 0 and validation >= 0; write for"
        " example 99,1, or 1,0 to hold nothing back"
    )


def _parse_valid_data_path(valid_data_path: Sequence[str]) -> dict[str, str]:
    """Return prefixes by name of NAME=PREFIX parts."""
    sets: dict[str, str] = {}
    for part in valid_data_path:
        name, _, prefix = part.partition("=")
        if not name or not prefix:
            raise ConfigError(
                f"--valid-data-path has {part!r}; each must be NAME=PREFIX; give the set a name"
            )
        if name in sets:
            raise ConfigError(
                f"--valid-data-path names a set {name!r} twice ({sets[name]} and {prefix}); names"
                " must differ; rename one"
            )
        sets[name] = prefix
    return sets


def _number(text: str) -> float | None:
    """Return text as a finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _split_point(file: TokenFile, train_share: float) -> int:
    """Return the document start nearest to where the training share ends, never 0.

    Raises:
        DataError: A share is to be held back, but there is no document start to cut at.
    """
    if train_share == 1.0:
        return file.num_tokens
    starts = file.document_starts
    starts = starts[(starts > 0) & (starts < file.num_tokens)]
    if not starts.size:
        raise DataError(
            f"{file.prefix} has {file.num_documents} document(s) and {file.num_tokens} tokens;"
            " --split cuts between documents, so it needs at least two; hold nothing back with"
            " --split 1,0, or give --valid-data-path"
        )
    return int(starts[np.argmin(np.abs(starts - train_share * file.num_tokens))])


def _window_source(
    file: TokenFile,
    name: str,
    tokens: tuple[int, int],
    *,
    seq_length: int,
    seed: int,
    index: int,
    vocab_size: int,
) -> WindowSource:
    """Return the source over a range of a file's tokens."""
    start, stop = tokens
    first, last = np.searchsorted(file.document_starts, [start, stop])
    return WindowSource(
        name=name,
        tokens=file.tokens,
        start_token=start,
        stop_token=stop,
        seq_length=seq_length,
        seed=seed,
        index=index,
        num_documents=int(last - first),
        vocab_size=vocab_size,
    )


def _row(
    use: str, name: str, source: Source, weight: float | None, epochs: float | None
) -> dict[str, str | int | float | None]:
    """Return one row of `describe`."""
    return {
        "use": use,
        "source": name,
        "weight": weight,
        "documents": source.num_documents,
        "tokens": source.num_tokens,
        "windows": source.num_windows,
        "epochs": epochs,
    }
