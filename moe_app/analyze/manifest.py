"""Describes a collection of routing: which model, which text, which shards; checked when read."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small
from moe_app.analyze.shard_file import MOST_ROWS, Column

NAME = "manifest.json"
TOKENS_NAME = "tokens.json"
"""How the tokens of the vocabulary are written, a list of texts."""
FORMAT = 1
KINDS = ("moe", "moa")
MOST_EXPERTS = np.iinfo(np.int16).max
_MOST_BYTES = 1 << 27
_MOST_IDS = 1 << 24
_AGAIN = "collect the routing again, or restore the file"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Router:
    """Describes one router of the model."""

    kind: str
    """Is "moe" in a feed-forward layer, "moa" in a self-attention."""
    layer: int
    """Counted from 0."""
    num_experts: int
    topk: int

    @property
    def name(self) -> str:
        """Return the prefix of its columns."""
        return f"{self.kind}.{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Describes the two files of a shard."""

    tokens: int
    windows: int
    data: str
    """SHA-256 of its windows."""
    token_file: Mapping[str, Any]
    """Size and digest."""
    window_file: Mapping[str, Any]
    """Size and digest."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes a collection."""

    source: str
    """Directory of the model."""
    source_kind: str
    """Either "native" or "hf"."""
    model_hash: str
    iteration: int
    consumed_tokens: int
    """Tokens it was trained on; -1 if not known."""
    precision: str
    vocab_size: int
    routers: tuple[Router, ...]
    domains: tuple[str, ...]
    paths: tuple[str, ...]
    """Of the domains' texts."""
    seq_length: int
    tokens_per_domain: int
    """Where each text was cut off; 0 took all."""
    shard_tokens: int
    shards: tuple[Shard, ...] = ()
    is_complete: bool = False
    format: int = FORMAT

    @property
    def data_hash(self) -> str:
        """Return what tells these tokens from others, however they were computed."""
        digests = "".join(shard.data for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    def settings(self) -> dict[str, Any]:
        """Return what a resumed collection must share with what was begun."""
        return asdict(replace(self, shards=(), is_complete=False))

    def token_columns(self) -> list[Column]:
        """Return the columns of a shard's file of tokens."""
        columns = [
            Column(name="domain", dtype=np.int16),
            *(Column(name=name, dtype=np.int32) for name in ("input", "predicted", "next")),
        ]
        for router in self.routers:
            width = router.topk
            columns.append(Column(name=f"{router.name}.experts", dtype=np.int16, width=width))
            columns.append(Column(name=f"{router.name}.gates", dtype=np.float32, width=width))
        return columns

    def window_columns(self) -> list[Column]:
        """Return the columns of a shard's file of windows."""
        columns = [
            Column(name="domain", dtype=np.int16),
            Column(name="tokens", dtype=np.int32),
        ]
        for router in self.routers:
            width = router.num_experts
            columns.append(Column(name=f"{router.name}.counts", dtype=np.int32, width=width))
            columns.append(Column(name=f"{router.name}.scores", dtype=np.float64, width=width))
            columns.append(Column(name=f"{router.name}.entropy", dtype=np.float64))
        return columns


def token_path(directory: Path, number: int) -> Path:
    """Return where the tokens of shard `number` are."""
    return directory / f"tokens-{number:06d}.parquet"


def window_path(directory: Path, number: int) -> Path:
    """Return where the windows of shard `number` are."""
    return directory / f"windows-{number:06d}.parquet"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest; the data hash is added for the reader."""
    values = {**asdict(manifest), "data_hash": manifest.data_hash}
    write_text(directory / NAME, json.dumps(values, indent=1) + "\n", durable=True)


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = directory / NAME
    try:
        values = json.loads(read_small(path, most_bytes=_MOST_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; an input is a directory that"
            " `analyze_routing.py collect` wrote; check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; {_AGAIN}") from error
    return _Reader(path, values).manifest()


@dataclass(frozen=True)
class _Reader:
    """Takes typed values out of parsed JSON."""

    path: Path
    values: Any
    where: str = ""

    def manifest(self) -> Manifest:
        if self.number("format", 0, 1 << 30) != FORMAT:
            raise self.error("format", f"it must be {FORMAT}, which this version reads")
        routers = tuple(
            Router(
                kind=each.choice("kind", KINDS),
                layer=each.number("layer", 0, 1 << 16),
                num_experts=each.number("num_experts", 1, MOST_EXPERTS),
                topk=each.number("topk", 1, MOST_EXPERTS),
            )
            for each in self.items("routers")
        )
        if not routers or len({router.name for router in routers}) < len(routers):
            raise self.error("routers", "it must name at least one router, each once")
        if any(router.topk > router.num_experts for router in routers):
            raise self.error("routers", "topk must be at most num_experts")
        domains = self.texts("domains")
        if not domains or len(domains) > MOST_EXPERTS or len(self.texts("paths")) != len(domains):
            raise self.error("domains", "there must be at least one, and as many paths")
        return Manifest(
            source=self.text("source"),
            source_kind=self.choice("source_kind", ("native", "hf")),
            model_hash=self.text("model_hash"),
            iteration=self.number("iteration", 0, 1 << 62),
            consumed_tokens=self.number("consumed_tokens", -1, 1 << 62),
            precision=self.text("precision"),
            vocab_size=self.number("vocab_size", 1, _MOST_IDS),
            routers=routers,
            domains=domains,
            paths=self.texts("paths"),
            seq_length=self.number("seq_length", 1, MOST_ROWS),
            tokens_per_domain=self.number("tokens_per_domain", 0, 1 << 62),
            shard_tokens=self.number("shard_tokens", 1, MOST_ROWS),
            shards=tuple(each.shard() for each in self.items("shards")),
            is_complete=self.get("is_complete", bool) is True,
        )

    def shard(self) -> Shard:
        return Shard(
            tokens=self.number("tokens", 1, MOST_ROWS),
            windows=self.number("windows", 1, MOST_ROWS),
            data=self.sha256("data"),
            token_file=self.described("token_file"),
            window_file=self.described("window_file"),
        )

    def described(self, key: str) -> dict[str, Any]:
        inner = _Reader(self.path, self.get(key, dict), f"{self.where}{key}.")
        return {"bytes": inner.number("bytes", 1, 1 << 40), "sha256": inner.sha256("sha256")}

    def get(self, key: str, kind: type[T]) -> T:
        value = self.values.get(key) if isinstance(self.values, dict) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"it must be of type {kind.__name__}")
        return value

    def number(self, key: str, least: int, most: int) -> int:
        value = self.get(key, int)
        if not least <= value <= most:
            raise self.error(key, f"it must be from {least:,} to {most:,}")
        return value

    def text(self, key: str) -> str:
        return self.get(key, str)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.get(key, str)
        if value not in choices:
            raise self.error(key, f"it must be {' or '.join(choices)}")
        return value

    def sha256(self, key: str) -> str:
        value = self.get(key, str)
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise self.error(key, "it must be a SHA-256 in hexadecimal")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "it must be a list of texts")
        return tuple(values)

    def items(self, key: str) -> "list[_Reader]":
        values = self.get(key, list)
        return [
            _Reader(self.path, value, f"{self.where}{key}[{number}].")
            for number, value in enumerate(values)
        ]

    def error(self, key: str, rule: str) -> DataError:
        value = self.values.get(key) if isinstance(self.values, dict) else None
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        return DataError(f"{self.path}: {self.where}{key} is {shown}; {rule}; {_AGAIN}")
