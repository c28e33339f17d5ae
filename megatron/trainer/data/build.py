"""Builds training samples and validation sets from a DataConfig, every file verified first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.data_path import (
    parse_split,
    parse_valid_data_path,
    prefix_of,
    read_mixtures,
    source_names,
)
from megatron.trainer.data.indexed import TokenFacts, TokenFile, open_tokens
from megatron.trainer.data.read_ahead import Loading
from megatron.trainer.data.repetition import OLMOE_RULE
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import MockSource, Source, WindowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataBundle:
    """Holds all data of a run."""

    train: SampleStream
    """What the run trains on."""
    validation: dict[str, ValidationSet]
    """What it evaluates on, by name; may be empty."""

    def sources(self) -> dict[str, Source]:
        """Return what windows are read from: by use, train or validation, and name."""
        train = {f"train {source.name}": source for source in self.train.sources}
        return train | {f"validation {name}": each.source for name, each in self.validation.items()}


def build_data(
    cfg: DataConfig,
    *,
    vocab_size: int,
    seq_length: int,
    seed: int,
    samples_per_step: int = 1,
    gpu: torch.device | None = None,
    documents: DocumentRule | None = None,
    verified: Mapping[str, TokenFacts] | None = None,
) -> DataBundle:
    """Open and verify every file the run will read, and lay out the samples.

    Args:
        cfg: Paths, blends, phases and split.
        vocab_size: Token ids the model has an embedding for; every token is checked against it.
        seq_length: Positions in a sample (s).
        seed: What the order follows from.
        samples_per_step: The global batch size, by which earlier versions rounded phases up.
        gpu: Where batches will be copied to; None leaves them in plain memory.
        documents: How documents are kept apart; None reads windows without their borders.
        verified: What `verify_once` found, by prefix; other files are verified here.

    Raises:
        ConfigError: Flags are missing, contradict each other or make no sense.
        DataError: A file is missing, damaged, too short or does not fit the vocabulary.
    """
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must be >= 0; give another one")
    loading = Loading(num_ahead=cfg.num_workers, gpu=gpu)
    if cfg.mock_data:
        eod = None if documents is None else documents.eod
        return _mock_data(loading, vocab_size=vocab_size, seq_length=seq_length, seed=seed, eod=eod)
    mixtures = read_mixtures(cfg, samples_per_step=samples_per_step, seq_length=seq_length)
    names = source_names(mixtures)
    train_share = parse_split(cfg.split)
    cut_out = partial(
        _window_source,
        seq_length=seq_length,
        seed=seed,
        vocab_size=vocab_size,
        has_starts=documents is not None,
    )
    known = verified or {}
    train: list[Source] = []
    validation: dict[str, ValidationSet] = {}
    for prefix, name in {prefix_of(part): name for part, name in names.items()}.items():
        file = open_tokens(prefix, vocab_size=vocab_size, verified=known.get(prefix))
        cut = _split_point(file, train_share)
        train.append(cut_out(file, name, (0, cut)))
        if cut < file.num_tokens:
            held_back = cut_out(file, name, (cut, file.num_tokens))
            validation[name] = ValidationSet(name, held_back, loading)
    for name, prefix in parse_valid_data_path(cfg.valid_data_path).items():
        if name in validation:
            raise ConfigError(
                f"--valid-data-path names a set {name!r}, and --split {cfg.split} holds one back"
                " under that name; names must differ; rename it"
            )
        file = open_tokens(prefix, vocab_size=vocab_size, verified=known.get(prefix))
        whole = cut_out(file, name, (0, file.num_tokens))
        validation[name] = ValidationSet(name, whole, loading)
    phases = [
        Phase(
            name=mixture.phase,
            sources=tuple(names[part] for part in mixture.parts),
            weights=mixture.weights,
            num_samples=mixture.num_samples,
            whole_steps=mixture.whole_steps,
        )
        for mixture in mixtures
    ]
    stream = SampleStream(
        train,
        phases,
        seq_length=seq_length,
        seed=seed,
        loading=loading,
        repetition=OLMOE_RULE if cfg.mask_repetitions else None,
    )
    return DataBundle(stream, validation)


def token_prefixes(cfg: DataConfig) -> list[str]:
    """Return the prefixes of all token files that a run reads, each once; none for random tokens.

    Raises:
        ConfigError: Flags are missing, contradict each other or make no sense.
    """
    if cfg.mock_data:
        return []
    mixtures = read_mixtures(cfg, samples_per_step=1, seq_length=1)
    parts = [prefix_of(part) for part in source_names(mixtures)]
    return list(dict.fromkeys([*parts, *parse_valid_data_path(cfg.valid_data_path).values()]))


def _mock_data(
    loading: Loading, *, vocab_size: int, seq_length: int, seed: int, eod: int | None
) -> DataBundle:
    """Return random tokens to train on, and one validation set of others.

    The flag stands above a recipe's files, so that any recipe can be tried without its data.
    """
    source = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed, eod=eod)
    other = MockSource(vocab_size=vocab_size, seq_length=seq_length, seed=seed + 1, eod=eod)
    phase = Phase(sources=(source.name,), weights=(1.0,))
    stream = SampleStream([source], [phase], seq_length=seq_length, seed=seed, loading=loading)
    return DataBundle(stream, {other.name: ValidationSet(other.name, other, loading)})


def _split_point(file: TokenFile, train_share: float) -> int:
    """Return the document start nearest to where the training share ends, never 0.

    Raises:
        DataError: A share is to be held back, but there is no document start to cut at.
    """
    if train_share == 1.0:
        return file.num_tokens
    starts = file.document_starts
    goal = train_share * file.num_tokens
    above = starts.first_from(max(1, math.ceil(goal)))
    around = [starts.bound(n) for n in (above - 1, above) if 0 <= n < len(starts)]
    inside = [start for start in around if 0 < start < file.num_tokens]
    if not inside:
        raise DataError(
            f"{file.prefix} has {file.num_documents} document(s) and {file.num_tokens} tokens;"
            " --split cuts between documents, so it needs at least two; hold nothing back with"
            " --split 1,0, or give --valid-data-path"
        )
    return min(inside, key=lambda start: abs(start - goal))


def _window_source(
    file: TokenFile,
    name: str,
    tokens: tuple[int, int],
    *,
    seq_length: int,
    seed: int,
    vocab_size: int,
    has_starts: bool,
) -> WindowSource:
    """Return the source over a range of a file's tokens."""
    start, stop = tokens
    first, last = (file.document_starts.first_from(token) for token in (start, stop))
    return WindowSource(
        name=name,
        tokens=file.tokens,
        start_token=start,
        stop_token=stop,
        seq_length=seq_length,
        seed=seed,
        num_documents=last - first,
        vocab_size=vocab_size,
        prefix=file.prefix,
        facts=file.facts,
        document_starts=file.document_starts if has_starts else None,
    )
