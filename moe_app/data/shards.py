"""Joins the shards of one work, which several nodes wrote, into the token file they make up."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.fingerprint import fingerprint
from megatron.trainer.data.indexed import TokenFacts, open_tokens
from megatron.trainer.data.token_draft import TokenDraft
from megatron.trainer.data.token_manifest import (
    TokenManifest,
    check_facts,
    manifest_path,
    read_manifest,
)
from megatron.trainer.data.writer import LENGTH_DTYPE
from megatron.trainer.errors import DataError

_HEADER_BYTES = 34
_BLOCK_TOKENS = 1 << 24
_BLOCK_DOCUMENTS = 1 << 20
_SHOWN = 4


def shard_prefix(whole: str, *, index: int, count: int) -> str:
    """Return the prefix of one shard of a token file; the file's own where there is one shard."""
    return whole if count == 1 else f"{whole}.shard-{index:05d}-of-{count:05d}"


def written_facts(prefix: str, manifest: TokenManifest) -> TokenFacts:
    """Return the facts of a token file, or of a shard, which may hold no document.

    Raises:
        DataError: As `open_tokens`.
    """
    tokens = Path(f"{prefix}.bin")
    if manifest.num_tokens or not tokens.is_file() or tokens.stat().st_size:
        return open_tokens(prefix).facts
    empty = np.empty(0, np.dtype(manifest.dtype))
    digest = fingerprint(Path(f"{prefix}.idx"), empty)
    return TokenFacts(dtype=manifest.dtype, num_documents=0, num_tokens=0, fingerprint=digest)


def merge_shards(whole: str, *, count: int) -> None:
    """Write the token file that shards make up, byte for byte as one process would have.

    The shards stay. Started again after a kill, it goes on after the last whole shard.

    Args:
        whole: The prefix of the token file, without the number of a shard.
        count: How many shards there are.

    Raises:
        DataError: A shard is missing, damaged or of other work.
    """
    prefixes = [shard_prefix(whole, index=each, count=count) for each in range(count)]
    manifests = _read_manifests(prefixes)
    work = {"merged": [each.fingerprint for each in manifests]}
    with TokenDraft(whole, work, vocab_size=manifests[0].vocab_size) as draft:
        if not draft.is_written:
            for number in range(draft.progress.get("num_shards", 0), count):
                _append(draft, prefixes[number], manifests[number])
                draft.commit({"num_shards": number + 1}, is_written=number + 1 == count)
        if not draft.num_documents:
            raise DataError(
                f"{whole}: 0 documents in {count} shards; there must be at least one; check the"
                " --input of the shards"
            )
        merged = draft.finish(_described(manifests))
    print(
        f"{whole}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens of"
        f" {merged.dtype} from {count} shards"
    )


def _read_manifests(prefixes: Sequence[str]) -> list[TokenManifest]:
    """Return the manifests of shards that are there and belong together.

    Raises:
        DataError: They do not.
    """
    found = [read_manifest(prefix) for prefix in prefixes]
    missing = [prefix for prefix, each in zip(prefixes, found, strict=True) if each is None]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{len(missing)} of {len(prefixes)} shards are not finished:"
            f" {', '.join(missing[:_SHOWN])}{more}; all must be; start those again, or correct"
            " --num-shards"
        )
    manifests = [each for each in found if each is not None]
    for index, (prefix, manifest) in enumerate(zip(prefixes, manifests, strict=True)):
        of_it = (manifest.shard_index, manifest.num_shards, manifest.work_sha256)
        if of_it != (index, len(prefixes), manifests[0].work_sha256) or not of_it[2]:
            raise DataError(
                f"{manifest_path(prefix)} is of shard {of_it[0]} of {of_it[1]} of the work"
                f" {of_it[2][:16] or 'of no name'}, but it must be of shard {index} of"
                f" {len(prefixes)} of the work {manifests[0].work_sha256[:16]}, as"
                f" {prefixes[0]} is: with the same key, inputs and tokenizer"
                f" ({_tokenizer(manifest)}; {_tokenizer(manifests[0])}); write the shard again"
            )
        check_facts(prefix, manifest, written_facts(prefix, manifest))
    return manifests


def _tokenizer(manifest: TokenManifest) -> str:
    return f"{manifest.tokenizer_file} {manifest.tokenizer_sha256[:16]}"


def _append(draft: TokenDraft, prefix: str, manifest: TokenManifest) -> None:
    """Append the documents of one shard, which have one sequence each, in blocks."""
    no_ids, no_lengths = np.empty(0, draft.dtype), np.empty(0, LENGTH_DTYPE)
    for ids in _mapped(f"{prefix}.bin", draft.dtype, manifest.num_tokens, 0, _BLOCK_TOKENS):
        draft.append(ids, no_lengths)
    count = manifest.num_documents
    for lengths in _mapped(f"{prefix}.idx", LENGTH_DTYPE, count, _HEADER_BYTES, _BLOCK_DOCUMENTS):
        draft.append(no_ids, lengths)


def _mapped(
    path: str, dtype: np.dtype[Any], count: int, offset: int, block: int
) -> Iterator[npt.NDArray[Any]]:
    """Yield what a file holds from a byte on, in blocks."""
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, count, block):
            size = min(block, count - start)
            yield np.frombuffer(file.read(size * dtype.itemsize), dtype)


def _described(manifests: Sequence[TokenManifest]) -> dict[str, Any]:
    """Return the manifest of all shards, as of one process, without the fields of TokenFacts."""
    sources: dict[str, dict[str, Any]] = {}
    for each in chain.from_iterable(manifest.sources for manifest in manifests):
        known = sources.setdefault(str(each.get("path")), {})
        for name, value in each.items():
            is_count = name.startswith("num_") and name != "num_bytes" and name in known
            known[name] = known[name] + value if is_count else value
    added = ("num_text_bytes", "num_empty_documents", "num_bad_lines")
    facts = {each.name for each in dataclasses.fields(TokenFacts)}
    first = {
        each.name: getattr(manifests[0], each.name)
        for each in dataclasses.fields(TokenManifest)
        if each.name not in facts
    }
    return first | {
        **{name: sum(getattr(each, name) for each in manifests) for name in added},
        "num_shards": 1,
        "shard_index": 0,
        "sources": tuple(sources.values()),
    }
