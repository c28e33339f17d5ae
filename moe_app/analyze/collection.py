"""Reads a collection of routing, shard by shard and only the columns asked for."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import DataError
from megatron.trainer.io.bounded_read import read_small
from moe_app.analyze.manifest import (
    TOKENS_NAME,
    Column,
    Manifest,
    Router,
    Shard,
    read_manifest,
    token_path,
    window_path,
)
from moe_app.analyze.shard_file import ShardFile
from moe_ext.analysis.arrays import check_range

Arrays = dict[str, npt.NDArray[Any]]
_MOST_BYTES = 1 << 28


class Collection:
    """Reads what `collect` wrote. Every file is compared with the manifest, once.

    Args:
        directory: of the collection.

    Raises:
        DataError: it is none, or not complete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        if not self.manifest.is_complete:
            raise DataError(
                f"{directory} is not complete: {len(self.manifest.shards)} shards are there; run"
                " `collect` again with the same flags, and it goes on where it stopped"
            )
        self._checked: set[Path] = set()
        self._checked_columns: set[tuple[Path, str]] = set()

    def routers(self, kind: str | None = None) -> list[Router]:
        """Return the routers, of one kind or all."""
        return [each for each in self.manifest.routers if kind in (None, each.kind)]

    def kinds(self) -> list[str]:
        """Return the kinds of routers, feed-forward first."""
        there = {router.kind for router in self.manifest.routers}
        return [kind for kind in ("moe", "moa") if kind in there]

    def tokens(self, *names: str) -> Iterator[Arrays]:
        """Yield columns of the tokens of each shard.

        Raises:
            DataError: a file is damaged, foreign, or holds values out of range.
        """
        columns = self.manifest.token_columns()
        for number, shard in enumerate(self.manifest.shards):
            path = token_path(self.directory, number)
            yield self._read(path, columns, shard, shard.tokens, shard.token_file, names)

    def windows(self, *names: str) -> Iterator[Arrays]:
        """Yield columns of the windows of each shard; see `tokens`."""
        columns = self.manifest.window_columns()
        for number, shard in enumerate(self.manifest.shards):
            path = window_path(self.directory, number)
            yield self._read(path, columns, shard, shard.windows, shard.window_file, names)

    def token_texts(self) -> list[str] | None:
        """Return how each token is written; None if that is not known.

        Raises:
            DataError: the file is damaged.
        """
        path = self.directory / TOKENS_NAME
        if not path.exists():
            return None
        try:
            texts = json.loads(read_small(path, most_bytes=_MOST_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); it lists the tokens' texts; remove it, and they"
                " are shown by their ids"
            ) from error
        is_valid = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if not is_valid or len(texts) != self.manifest.vocab_size:
            raise DataError(
                f"{path} is no list of {self.manifest.vocab_size} texts; it lists the tokens'"
                " texts; remove it, and they are shown by their ids"
            )
        return texts

    def _read(
        self,
        path: Path,
        columns: Sequence[Column],
        shard: Shard,
        rows: int,
        described: Any,
        names: Sequence[str],
    ) -> Arrays:
        known = None if path in self._checked else described
        with ShardFile(path, columns, rows=rows, described=known) as file:
            arrays = file.read(names)
        self._checked.add(path)
        try:
            for name, values in arrays.items():
                if (path, name) not in self._checked_columns:
                    self._check(name, values)
                    self._checked_columns.add((path, name))
        except ValueError as error:
            raise DataError(
                f"{path}: {error}; it is damaged or of another collection; collect the routing"
                " again"
            ) from error
        return arrays

    def _check(self, name: str, values: npt.NDArray[Any]) -> None:
        """Refuse ids out of range, and an expert that a token has twice."""
        manifest = self.manifest
        if name == "domain":
            check_range(values, len(manifest.domains), what="domain")
        elif name in ("input", "predicted"):
            check_range(values, manifest.vocab_size, what="token id")
        elif name == "next":
            check_range(values + 1, manifest.vocab_size + 1, what="token id + 1")
        elif name.endswith(".experts"):
            router = next(each for each in manifest.routers if name == f"{each.name}.experts")
            check_range(values, router.num_experts, what="expert")
            ordered = np.sort(values, axis=1)
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                raise ValueError("a token has an expert twice")
        elif name in ("tokens",) or name.endswith(".counts"):
            if values.size and int(values.min()) < 0:
                raise ValueError(f"column {name} has a negative number")
        elif not np.isfinite(values).all():
            raise ValueError(f"column {name} has a number that is not finite")


def require_comparable(collections: Sequence[Collection]) -> None:
    """Refuse collections that are not of the same text and architecture.

    Raises:
        DataError: they differ; names the two and what differs.
    """
    first = collections[0]
    for other in collections[1:]:
        for what, get, rule in (
            ("routers", _shape, "checkpoints of one run have the same experts in every layer"),
            ("vocabulary", lambda each: each.vocab_size, "they need the same tokens"),
            ("precision", lambda each: each.precision, "rounding changes what is chosen"),
            ("data", lambda each: each.data_hash[:12], "the same tokens must be compared"),
        ):
            mine, theirs = get(first.manifest), get(other.manifest)
            if mine != theirs:
                raise DataError(
                    f"{other.directory} cannot be compared with {first.directory}: {what}"
                    f" {theirs} against {mine}; {rule}; collect both alike, or leave one out"
                )


def _shape(manifest: Manifest) -> str:
    """Describe the routers of a model in a few words."""
    words = []
    for kind in ("moe", "moa"):
        mine = [router for router in manifest.routers if router.kind == kind]
        sizes = sorted({(router.num_experts, router.topk) for router in mine})
        shown = " and ".join(f"{experts} experts, k {topk}" for experts, topk in sizes)
        words += [f"{kind} {len(mine)} layers of {shown}"] if mine else []
    return "; ".join(words)
