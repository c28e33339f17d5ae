"""From a DataConfig to training samples and validation sets, everything verified first."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import torch

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.indexed import TokenFile, open_tokens
from megatron.trainer.data.read_ahead import Loading
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import MockSource, Source, WindowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError, DataError

_STEM_SUFFIX = "_text_document"
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class DataBundle:
    """All data of a run."""

    train: SampleStream
    """What the run trains on."""
    validation: dict[str, ValidationSet]
    """What it evaluates on, by name; may be empty."""


@dataclass(frozen=True)
class _Mixture:
    """A parsed data_path, and the phase it belongs to."""

    phase: str | None
    weights: tuple[float, ...]
    parts: tuple[str, ...]
    """PREFIX or NAME=PREFIX each."""
    num_samples: int | None


def build_data(
    cfg: DataConfig,
    *,
    vocab_size: int,
    seq_length: int,
    seed: int,
    samples_per_step: int = 1,
    gpu: torch.device | None = None,
) -> DataBundle:
    """Open and verify every file the run will read, and lay out the samples.

    Args:
        cfg: Paths, blends, phases and split.
        vocab_size: Token ids the model has an embedding for; every token is held against it.
        seq_length: Positions in a sample (s).
        seed: What the order follows from.
        samples_per_step: The global batch size; phases are rounded up to whole steps.
        gpu: Where batches will be copied to; None leaves them in plain memory.

    Raises:
        ConfigError: Flags are missing, contradict each other or make no sense.
        DataError: A file is missing, damaged, too short or does not fit the vocabulary.
    """
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must be >= 0; give another one")
    loading = Loading(num_ahead=cfg.num_workers, gpu=gpu)
    if cfg.mock_data:
        return _mock_data(loading, vocab_size=vocab_size, seq_length=seq_length, seed=seed)
    mixtures = _mixtures(cfg, tokens_per_step=samples_per_step * seq_length, seq_length=seq_length)
    names = _source_names(mixtures)
    train_share = _parse_split(cfg.split)
    common = {"seq_length": seq_length, "seed": seed, "vocab_size": vocab_size}
    train: list[Source] = []
    validation: dict[str, ValidationSet] = {}
    for prefix, name in {_prefix(part): name for part, name in names.items()}.items():
        file = open_tokens(prefix, vocab_size=vocab_size)
        cut = _split_point(file, train_share)
        train.append(_window_source(file, name, (0, cut), **common))
        if cut < file.num_tokens:
            held_back = _window_source(file, name, (cut, file.num_tokens), **common)
            validation[name] = ValidationSet(name, held_back, loading)
    for name, prefix in _parse_valid_data_path(cfg.valid_data_path).items():
        if name in validation:
            raise ConfigError(
                f"--valid-data-path names a set {name!r}, and --split {cfg.split} holds one back"
                " under that name; names must differ; rename it"
            )
        file = open_tokens(prefix, vocab_size=vocab_size)
        whole = _window_source(file, name, (0, file.num_tokens), **common)
        validation[name] = ValidationSet(name, whole, loading)
    phases = [
        Phase(
            name=mixture.phase,
            sources=tuple(names[part] for part in mixture.parts),
            weights=mixture.weights,
            num_samples=mixture.num_samples,
        )
        for mixture in mixtures
    ]
    stream = SampleStream(train, phases, seq_length=seq_length, seed=seed, loading=loading)
    return DataBundle(stream, validation)


def _mixtures(cfg: DataConfig, *, tokens_per_step: int, seq_length: int) -> list[_Mixture]:
    """The mixture of every phase, or of the one that a plain data_path makes."""
    if not cfg.phases and not cfg.data_path:
        raise ConfigError(
            "neither --data-path nor --mock-data is given; a run needs one of them; name a token"
            " file's PREFIX, or train on random tokens with --mock-data"
        )
    if not cfg.phases:
        weights, parts = _parse_data_path(cfg.data_path, "--data-path")
        return [_Mixture(None, tuple(weights), tuple(parts), None)]
    mixtures = []
    for phase in cfg.phases:
        weights, parts = _parse_data_path(phase.data_path, f"data_path of phase {phase.name!r}")
        steps = -(-phase.train_tokens // tokens_per_step)
        samples = steps * tokens_per_step // seq_length
        mixtures.append(_Mixture(phase.name, tuple(weights), tuple(parts), samples))
    return mixtures


def _source_names(mixtures: Sequence[_Mixture]) -> dict[str, str]:
    """Each part of a data_path -> the name of its source, in order of first appearance.

    Raises:
        ConfigError: A file has two names, or a name two files.
    """
    for mixture in mixtures:
        paths = [_prefix(part) for part in mixture.parts]
        _refuse_repeats(paths, where=mixture.phase)
    parts = list(dict.fromkeys(part for mixture in mixtures for part in mixture.parts))
    plain = [part for part in parts if not _NAMED.fullmatch(part)]
    names = dict(zip(plain, unique_names(plain), strict=True)) if plain else {}
    for part in parts:
        match = _NAMED.fullmatch(part)
        if match:
            names[part] = match[1]
    for key, what in ((lambda part: names[part], "name"), (_prefix, "file")):
        owners: dict[str, str] = {}
        for part in parts:
            owner = owners.setdefault(key(part), part)
            if owner != part:
                raise ConfigError(
                    f"--data-path has {owner} and {part}, one {what} for two sources; a source has"
                    " one file and one name in all phases; write NAME=PREFIX alike wherever it"
                    " stands"
                )
    return {part: names[part] for part in parts}


def _prefix(part: str) -> str:
    """The path in PREFIX or NAME=PREFIX, one spelling for each place."""
    match = _NAMED.fullmatch(part)
    return str(PurePath(match[2] if match else part))


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
    """A line for each source that the rows of `describe` draw more often than it has samples."""
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


def unique_names(prefixes: Sequence[str]) -> list[str]:
    """Name each prefix by its stem, with as many parent folders as make all names differ.

    Args:
        prefixes: Paths without .bin and .idx.

    Returns:
        Names in the same order: `a/x_text_document` is `x`, or `a/x` beside `b/x_text_document`.

    Raises:
        ConfigError: A prefix is given twice, or two differ in nothing that makes a name.
    """
    _refuse_repeats(prefixes, where=None)
    paths = [PurePath(prefix) for prefix in prefixes]
    parts = [(*path.parent.parts, path.name.removesuffix(_STEM_SUFFIX)) for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        if depth > max(len(part) for part in parts):
            raise ConfigError(
                f"--data-path names {' and '.join(prefixes)}, which differ only by {_STEM_SUFFIX};"
                " names must differ without it; rename one, or write NAME=PREFIX"
            )
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _refuse_repeats(prefixes: Sequence[str], *, where: str | None) -> None:
    paths = [PurePath(prefix) for prefix in prefixes]
    label = "--data-path" if where is None else f"data_path of phase {where!r}"
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(
                f"{label} names {path} {paths.count(path)} times; each file must be named once;"
                " add up its weights"
            )


def _mock_data(loading: Loading, *, vocab_size: int, seq_length: int, seed: int) -> DataBundle:
    """Return random tokens to train on, and one validation set of others.

    The flag stands above a recipe's files, so that any recipe can be tried without its data.
    """
    source = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed)
    other = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed + 1)
    phase = Phase(sources=(source.name,), weights=(1.0,))
    stream = SampleStream([source], [phase], seq_length=seq_length, seed=seed, loading=loading)
    return DataBundle(stream, {other.name: ValidationSet(other.name, other, loading)})


def _parse_data_path(data_path: Sequence[str], label: str) -> tuple[list[float], list[str]]:
    """Return weights and sources of one PREFIX or of WEIGHT PREFIX pairs.

    Raises:
        ConfigError: It is neither; `label` says whose data_path it is.
    """
    rule = f"{label} must be one PREFIX, or WEIGHT PREFIX pairs with weights > 0"
    if len(data_path) == 1:
        return [1.0], [data_path[0]]
    given = " ".join(data_path)
    if len(data_path) % 2:
        raise ConfigError(
            f"{label} has {len(data_path)} parts ({given}); {rule}; give each file a weight"
        )
    weights = []
    for part in data_path[::2]:
        weight = _number(part)
        if weight is None or weight <= 0:
            raise ConfigError(
                f"{label} has {part!r} where a weight belongs ({given}); {rule}; give each file"
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
        num_documents=int(last - first),
        vocab_size=vocab_size,
    )


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
