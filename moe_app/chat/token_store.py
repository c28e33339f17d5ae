"""Keeps tokens of conversations in a directory: raw arrays, and a manifest that describes them.

Nothing in it is executed: arrays are bytes of a stated type, whose size and digest the manifest
has, and whose values are checked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.indexed import check_ids
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import sync_file, write_durably
from megatron.trainer.io.bounded_read import open_regular, read_small
from megatron.trainer.io.hashing import add_file

FORMAT = "conversation tokens"
VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"tokens": "<i4", "counted": "|u1", "ends": "<i8", "labels": "|u1"}
"""The arrays: all tokens, which of them count, where each text ends, and each row's judgement."""

_MOST_MANIFEST_BYTES = 1 << 20
_BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """Holds the texts of a directory, mapped read-only."""

    path: Path
    """The directory."""
    tokens: npt.NDArray[np.int32]
    """[num_tokens] of all texts."""
    counted: npt.NDArray[np.uint8]
    """[num_tokens] 1 where a token counts."""
    ends: npt.NDArray[np.int64]
    """[num_texts] one past the last token of each text."""
    labels: npt.NDArray[np.uint8]
    """[num_units] 1 for a desirable answer; empty where there are no judgements."""
    facts: Mapping[str, Any]
    """What the manifest says besides."""
    fingerprint: str
    """Digest of all that the texts are."""

    @property
    def num_texts(self) -> int:
        """Return how many texts there are."""
        return len(self.ends)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each text."""
        return np.diff(self.ends, prepend=0)

    def read(self, text: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Return the tokens of a text, and which of them count; not copied."""
        begin = int(self.ends[text - 1]) if text else 0
        end = int(self.ends[text])
        return self.tokens[begin:end], self.counted[begin:end]


class StoreWriter:
    """Writes a directory text by text. Use it in a `with` statement.

    Args:
        path: An empty directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, BinaryIO] = {}
        self._digests = {name: hashlib.sha256() for name in DTYPES}
        self._sizes = dict.fromkeys(DTYPES, 0)
        self._num_tokens = 0

    def __enter__(self) -> "StoreWriter":
        """Open the files."""
        self._files = {name: (self.path / f"{name}.bin").open("xb") for name in DTYPES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def add(self, ids: npt.NDArray[np.integer], counted: npt.NDArray[np.bool_]) -> None:
        """Append a text."""
        self._num_tokens += len(ids)
        self._append("tokens", ids)
        self._append("counted", counted)
        self._append("ends", np.array([self._num_tokens]))

    def add_label(self, label: bool) -> None:
        """Append a judgement."""
        self._append("labels", np.array([label]))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Force everything to disk, the manifest last.

        Args:
            facts: What the manifest shall say besides; JSON values.
        """
        for file in self._files.values():
            sync_file(file)
        arrays = {
            name: {"bytes": self._sizes[name], "sha256": self._digests[name].hexdigest()}
            for name in DTYPES
        }
        manifest = {"format": FORMAT, "version": VERSION, "arrays": arrays, "facts": dict(facts)}
        write_durably(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
        content = values.astype(DTYPES[name]).tobytes()
        self._files[name].write(content)
        self._digests[name].update(content)
        self._sizes[name] += len(content)


def open_store(path: Path, *, key: str, vocab_size: int, seq_length: int) -> TokenStore:
    """Verify a directory, and map what it holds.

    Args:
        path: The directory.
        key: What its manifest must have as `key`.
        vocab_size: Token ids that there are.
        seq_length: Tokens that a text may have.

    Raises:
        DataError: It is damaged, or not what its name says.
    """
    manifest = _read_manifest(path)
    facts = manifest["facts"]
    if facts.get("key") != key:
        raise _damaged(path, f"its manifest is of {facts.get('key')!r:.80}")
    arrays, digests = {}, []
    for name, dtype in DTYPES.items():
        described = manifest["arrays"].get(name)
        if not isinstance(described, dict):
            raise _damaged(path, f"its manifest does not describe {name}.bin")
        arrays[name], digest = _map(path / f"{name}.bin", dtype, described)
        digests.append(digest)
    store = TokenStore(
        path=path,
        facts=facts,
        fingerprint=hashlib.sha256("".join([key, *digests]).encode()).hexdigest(),
        **arrays,
    )
    _check(store, vocab_size=vocab_size, seq_length=seq_length)
    return store


def _check(store: TokenStore, *, vocab_size: int, seq_length: int) -> None:
    """Check what the arrays hold.

    Raises:
        DataError: It cannot be tokens of texts.
    """
    lengths = store.lengths
    if not len(lengths) or lengths.min() < 1 or lengths.max() > seq_length:
        raise _damaged(store.path, f"texts must have 1 to {seq_length} tokens")
    if store.ends[-1] != len(store.tokens) or len(store.tokens) != len(store.counted):
        raise _damaged(store.path, "its arrays do not fit each other")
    for start in range(0, len(store.tokens), _BLOCK):
        part = slice(start, start + _BLOCK)
        check_ids(store.tokens[part], vocab_size, file=str(store.path), first_token=start)
        if store.counted[part].max() > 1:
            raise _damaged(store.path, "counted.bin has other values than 0 and 1")


def _map(path: Path, dtype: str, described: Mapping[str, Any]) -> tuple[npt.NDArray[Any], str]:
    """Return a file as an array, and its digest.

    Raises:
        DataError: It is not as it is described.
    """
    digest = hashlib.sha256()
    try:
        with open(open_regular(path), "rb") as file:
            size = add_file(digest, file)
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read: {error.strerror}") from error
    if (size, digest.hexdigest()) != (described.get("bytes"), described.get("sha256")):
        raise _damaged(path.parent, f"{path.name} was changed after it was written")
    if size % np.dtype(dtype).itemsize:
        raise _damaged(path.parent, f"{path.name} has {size} bytes")
    if not size:
        return np.empty(0, dtype), digest.hexdigest()
    return np.memmap(path, dtype=dtype, mode="r"), digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path / MANIFEST, most_bytes=_MOST_MANIFEST_BYTES))
    except OSError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} is not JSON ({error})") from error
    parts: Sequence[object] = (
        [found.get("arrays"), found.get("facts")] if isinstance(found, dict) else []
    )
    if not parts or not all(isinstance(each, dict) for each in parts):
        raise _damaged(path, f"{MANIFEST} describes no arrays")
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise _damaged(path, f"{MANIFEST} is not of {FORMAT}, version {VERSION}")
    return dict(found)


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"the cache of tokens {path} is damaged: {problem}; remove that directory, and it is made"
        " again"
    )
