"""Parses data_path, valid_data_path and split: which files a run reads, with what weights."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.errors import ConfigError

_STEM_SUFFIX = "_text_document"
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Mixture:
    """Holds a parsed data_path, and the phase it belongs to."""

    phase: str | None
    """Name of the phase; None in a run that has only one."""
    weights: tuple[float, ...]
    """Share of each part; only ratios matter."""
    parts: tuple[str, ...]
    """PREFIX or NAME=PREFIX each."""
    num_samples: int | None
    """Samples of the phase; None means that it has no end."""
    whole_steps: int | None = None
    """The same rounded up to whole steps, as earlier versions counted them."""


def read_mixtures(cfg: DataConfig, *, samples_per_step: int, seq_length: int) -> list[Mixture]:
    """Return the mixture of every phase, or of the one that a plain data_path makes."""
    if not cfg.phases and not cfg.data_path:
        raise ConfigError(
            "neither --data-path nor --mock-data is given; a run needs one of them; name a token"
            " file's PREFIX, or train on random tokens with --mock-data"
        )
    if not cfg.phases:
        weights, parts = _parse_data_path(cfg.data_path, "--data-path")
        return [Mixture(None, tuple(weights), tuple(parts), None)]
    mixtures = []
    for phase in cfg.phases:
        weights, parts = _parse_data_path(phase.data_path, f"data_path of phase {phase.name!r}")
        samples = -(-phase.train_tokens // seq_length)
        whole_steps = -(-samples // samples_per_step) * samples_per_step
        mixture = Mixture(phase.name, tuple(weights), tuple(parts), samples, whole_steps)
        mixtures.append(mixture)
    return mixtures


def source_names(mixtures: Sequence[Mixture]) -> dict[str, str]:
    """Return the source name of each part of a data_path, in order of first appearance.

    Raises:
        ConfigError: A file has two names, or a name two files.
    """
    for mixture in mixtures:
        paths = [prefix_of(part) for part in mixture.parts]
        _refuse_repeats(paths, where=mixture.phase)
    parts = list(dict.fromkeys(part for mixture in mixtures for part in mixture.parts))
    plain = [part for part in parts if not _NAMED.fullmatch(part)]
    names = dict(zip(plain, unique_names(plain), strict=True)) if plain else {}
    for part in parts:
        match = _NAMED.fullmatch(part)
        if match:
            names[part] = match[1]
    for key, what in ((lambda part: names[part], "name"), (prefix_of, "file")):
        owners: dict[str, str] = {}
        for part in parts:
            owner = owners.setdefault(key(part), part)
            if owner != part:
                raise ConfigError(
                    f"--data-path has {owner} and {part}, one {what} for two sources; a source has"
                    " one file and one name in all phases; write the same NAME=PREFIX in"
                    " every phase"
                )
    return {part: names[part] for part in parts}


def prefix_of(part: str) -> str:
    """Return the path in PREFIX or NAME=PREFIX, in one spelling."""
    match = _NAMED.fullmatch(part)
    return str(PurePath(match[2] if match else part))


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


def parse_split(split: str) -> float:
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


def parse_valid_data_path(valid_data_path: Sequence[str]) -> dict[str, str]:
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
