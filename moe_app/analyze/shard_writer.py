"""Puts the parts of a shard together on rank 0, and writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.trainer.errors import CheckpointError, ConfigError, DataError
from moe_app.analyze.capture import ShardPart
from moe_app.analyze.manifest import (
    NAME,
    Manifest,
    Router,
    Shard,
    read_manifest,
    token_path,
    window_path,
    write_manifest,
)
from moe_app.analyze.shard_file import describe_file, write_table
from moe_app.analyze.texts import Window, digest, following_tokens


class ShardWriter:
    """Writes the shards of a collection one after the other, after those that are there already.

    Args:
        directory: of the collection; created if it is not there.
        manifest: its settings; the shards of an interrupted collection are taken over.

    Raises:
        ConfigError: the directory holds another collection, or something else.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self.manifest = manifest
        if (directory / NAME).exists():
            begun = read_manifest(directory)
            _require_same(directory, begun, manifest)
            self.manifest = replace(begun, is_complete=False)
        else:
            _require_empty(directory)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                write_manifest(directory, manifest)
            except OSError as error:
                raise _unwritable(directory, error) from error
        self._number = 0

    @property
    def num_finished(self) -> int:
        """Return how many shards there are already."""
        return len(self.manifest.shards)

    def is_finished(self, windows: Sequence[Window]) -> bool:
        """Return whether the next shard is there already, and pass over it if so.

        Raises:
            ConfigError: the shard is there, but of another text.
        """
        if self._number >= self.num_finished:
            return False
        if self.manifest.shards[self._number].data != digest(windows):
            raise ConfigError(
                f"shard {self._number} of {self._directory} is of another text than is given now;"
                " an interrupted collection is continued with the same text; restore it, or give"
                " another --output"
            )
        self._number += 1
        return True

    def write(self, windows: Sequence[Window], parts: Sequence[ShardPart]) -> int:
        """Write the next shard; return its tokens.

        Raises:
            CheckpointError: the model's logits are not finite.
            DataError: it cannot be written.
        """
        broken = sum(part.num_broken for part in parts)
        if broken:
            raise CheckpointError(
                f"the logits of {broken} tokens are not finite; a valid model gives finite ones, so"
                " its weights are corrupt; take an earlier checkpoint with --ckpt-step"
            )
        lengths = np.array([len(window.tokens) for window in windows])
        tokens, per_window = self._assemble(windows, lengths, parts)
        paths = [path(self._directory, self._number) for path in (token_path, window_path)]
        write_table(paths[0], self.manifest.token_columns(), tokens)
        write_table(paths[1], self.manifest.window_columns(), per_window)
        shard = Shard(
            tokens=int(lengths.sum()),
            windows=len(windows),
            data=digest(windows),
            token_file=describe_file(paths[0]),
            window_file=describe_file(paths[1]),
        )
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        self._save()
        self._number += 1
        return shard.tokens

    def finish(self) -> None:
        """Mark the collection as complete.

        Raises:
            ConfigError: there is no text, or it has become shorter than it was.
        """
        if self._number < self.num_finished:
            raise ConfigError(
                f"{self._directory} has {self.num_finished} shards, but the text given now makes"
                f" {self._number}; an interrupted collection is continued with the same text;"
                " restore it, or give another --output"
            )
        if not self.num_finished:
            raise ConfigError("the texts have no tokens; there is nothing to collect; give others")
        self.manifest = replace(self.manifest, is_complete=True)
        self._save()

    def _save(self) -> None:
        try:
            write_manifest(self._directory, self.manifest)
        except OSError as error:
            raise _unwritable(self._directory, error) from error

    def _assemble(
        self, windows: Sequence[Window], lengths: np.ndarray, parts: Sequence[ShardPart]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put every window's values where its tokens are."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        domains = np.array([window.domain for window in windows])
        tokens: dict[str, Any] = {
            "domain": np.repeat(domains, lengths),
            "input": np.concatenate([window.tokens for window in windows]),
            "next": np.concatenate([following_tokens(window) for window in windows]),
        }
        per_window: dict[str, Any] = {"domain": domains, "tokens": lengths}
        placed = _Placed(starts)
        for part in parts:
            placed.add("predicted", part.windows, part.predicted)
            for (kind, layer), router in part.routers.items():
                for name in ("experts", "gates"):
                    placed.add(f"{kind}.{layer}.{name}", part.windows, getattr(router, name))
                for name in ("counts", "scores", "entropy"):
                    key = f"{kind}.{layer}.{name}"
                    values = np.asarray(getattr(router, name))
                    whole = per_window.setdefault(
                        key, np.zeros((len(windows), *values.shape[1:]), dtype=values.dtype)
                    )
                    whole[part.windows] = values
        return {**tokens, **placed.whole()}, per_window


class _Placed:
    """Puts arrays of windows, from several ranks in any order, one after the other."""

    def __init__(self, starts: np.ndarray) -> None:
        self._starts = starts
        self._arrays: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, numbers: Sequence[int], arrays: Sequence[np.ndarray]) -> None:
        if not arrays:
            return
        shape = (int(self._starts[-1]), *arrays[0].shape[1:])
        whole = self._arrays.setdefault(name, np.empty(shape, dtype=arrays[0].dtype))
        for number, array in zip(numbers, arrays, strict=True):
            whole[self._starts[number] : self._starts[number + 1]] = array
            self._counts[name] = self._counts.get(name, 0) + len(array)

    def whole(self) -> Mapping[str, np.ndarray]:
        """Return everything; each value was given once."""
        for name, count in self._counts.items():
            assert count == self._starts[-1], f"{name}: {count} of {self._starts[-1]} tokens"
        return self._arrays


def routers_of(found: Mapping[tuple[str, int], tuple[int, int]]) -> tuple[Router, ...]:
    """Describe routers, attention first within a layer, by experts and k.

    Raises:
        CheckpointError: there are none.
    """
    if not found:
        raise CheckpointError(
            "the model has no experts: its feed-forward layers are dense, so there is no routing to"
            " analyse; give a checkpoint of a mixture-of-experts model"
        )
    order = sorted(found, key=lambda name: (name[1], name[0]))
    return tuple(
        Router(
            kind=kind, layer=layer, num_experts=found[kind, layer][0], topk=found[kind, layer][1]
        )
        for kind, layer in order
    )


def _require_same(directory: Path, begun: Manifest, wanted: Manifest) -> None:
    before, now = begun.settings(), wanted.settings()
    different = [key for key in now if before[key] != now[key]]
    if different:
        shown = "; ".join(f"{key}: {before[key]} there, {now[key]} now" for key in different[:3])
        raise ConfigError(
            f"{directory} holds a collection with other settings ({shown[:400]}); a collection is"
            " of one model and one text; give another --output"
        )


def _require_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(
            f"{directory} is not empty and holds no {NAME}; a collection has a directory of its"
            " own; give another --output"
        )


def _unwritable(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"{directory} cannot be written: {error.strerror or error}; free some space or give"
        " another --output"
    )
