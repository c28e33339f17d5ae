"""Says beside a token file what wrote it: PREFIX.json, written by preprocessing.

The name is one that Megatron-LM's tools pass over: its merge_datasets.py ends where a file of a
directory has no .bin or .idx of the same stem.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.data.indexed import TokenFacts
from megatron.trainer.data.tokenizer_files import locate_tokenizer, read_tokenizer_file
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small

FORMAT = "token file manifest"
FORMAT_VERSION = 1

_MOST_BYTES = 1 << 26  # a hundred thousand sources and more
_LONGEST_TEXT = 256
_SHOWN_DIGITS = 16
_SHOWN_FILES = 4


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """Holds what preprocessing knows of a token file."""

    tokenizer_type: str
    """As --tokenizer-type names it, an alias resolved."""
    tokenizer_file: str
    """Name of the tokenizer's file, without its folder."""
    tokenizer_sha256: str
    """Digest of that file."""
    vocab_size: int
    """Ids that the tokenizer has."""
    eod_token_id: int | None
    """Last id of every document; None where none was appended."""
    num_input_files: int
    """Files that were read."""
    num_text_bytes: int
    """UTF-8 bytes of text in them."""
    num_empty_documents: int
    """Documents without a token, which were not written."""
    num_bad_lines: int = 0
    """Lines that hold no document, which were skipped."""
    work_sha256: str = ""
    """What tells this work from another: key, tokenizer and inputs; empty where it is not known."""
    num_shards: int = 1
    """Parts that the work was cut into; 1 for all of it."""
    shard_index: int = 0
    """Which of them this is."""
    sources: tuple[Mapping[str, Any], ...] = ()
    """What was read: `path`, `num_bytes` and counts of each input, in order."""
    dtype: str
    """As in TokenFacts."""
    num_documents: int
    """As in TokenFacts."""
    num_tokens: int
    """As in TokenFacts."""
    fingerprint: str
    """As in TokenFacts."""

    @property
    def facts(self) -> TokenFacts:
        """Return what the token file was when it was written."""
        return TokenFacts(
            dtype=self.dtype,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            fingerprint=self.fingerprint,
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """Says which tokenizer a file holds, wherever it is."""

    kind: str
    """Its type."""
    path: Path
    """Where it is."""
    sha256: str
    """Digest of the file."""


def identify_tokenizer(tokenizer_type: str, tokenizer_model: str) -> TokenizerIdentity:
    """Return what identifies the tokenizer that two flags name.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    file = locate_tokenizer(tokenizer_type, tokenizer_model)
    digest = hashlib.sha256(read_tokenizer_file(file.path)).hexdigest()
    return TokenizerIdentity(kind=file.kind, path=file.path, sha256=digest)


def manifest_path(prefix: str) -> Path:
    """Return where the manifest of a token file is."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str, manifest: TokenManifest) -> None:
    """Write the manifest of a token file, complete or not at all."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(manifest),
    }
    write_text(manifest_path(prefix), json.dumps(content, indent=2) + "\n", durable=True)


def read_manifest(prefix: str) -> TokenManifest | None:
    """Return the manifest of a token file; None where there is none, as Megatron-LM leaves it.

    Raises:
        DataError: There is a file of that name, but it is no manifest.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(read_small(path, most_bytes=_MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _not_a_manifest(path, f"it cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _not_a_manifest(path, f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _not_a_manifest(path, f"its format is not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise _not_a_manifest(path, f"its format_version is {version!r:.40}, not {FORMAT_VERSION}")
    found: dict[str, Any] = {
        each.name: content.get(each.name, _default(each))
        for each in dataclasses.fields(TokenManifest)
    }
    for name, value in found.items():
        if not _is_valid(name, value):
            raise _not_a_manifest(path, f"its {name} is {value!r:.200}")
    return TokenManifest(**found | {"sources": tuple(found["sources"])})


def remove_manifest(prefix: str) -> None:
    """Remove the manifest of a token file that is about to be replaced.

    Raises:
        DataError: There is a file of that name, but it is no manifest.
    """
    if read_manifest(prefix) is not None:
        manifest_path(prefix).unlink()


def check_manifests(
    files: Mapping[str, TokenFacts],
    *,
    tokenizer_type: str,
    tokenizer_model: str | None,
    vocab_size: int,
    eod: int | None,
) -> list[str]:
    """Check token files that have a manifest against it, and it against the run.

    Args:
        files: What is in the files now, by prefix.
        tokenizer_type: The run's.
        tokenizer_model: The run's; None where it has none to compare with.
        vocab_size: Token ids the model has an embedding for.
        eod: The id that the run takes for the end of a document; None where it knows none.

    Returns:
        What is worth a line in the log.

    Raises:
        DataError: Something is not what it was when a file was written.
        ConfigError: The tokenizer's flags make no sense.
    """
    manifests = {prefix: read_manifest(prefix) for prefix in files}
    present = {prefix: each for prefix, each in manifests.items() if each is not None}
    for prefix, manifest in present.items():
        check_facts(prefix, manifest, files[prefix])
    if present and tokenizer_model is not None:
        tokenizer = identify_tokenizer(tokenizer_type, tokenizer_model)
        for prefix, manifest in present.items():
            check_tokenizer(prefix, manifest, tokenizer)
    for prefix, manifest in present.items():
        check_vocabulary(prefix, manifest, vocab_size=vocab_size, eod=eod)
    absent = [str(manifest_path(prefix)) for prefix in files if prefix not in present]
    if not absent:
        return []
    more = f" and {len(absent) - _SHOWN_FILES} more" if len(absent) > _SHOWN_FILES else ""
    return [
        "which tokenizer wrote the token files is not known: there is no"
        f" {', '.join(absent[:_SHOWN_FILES])}{more}"
    ]


def check_facts(prefix: str, manifest: TokenManifest, facts: TokenFacts) -> None:
    """Check that a manifest is that of the token file beside it.

    Raises:
        DataError: The file is another one than was written with the manifest.
    """
    written, found = (dataclasses.asdict(each) for each in (manifest.facts, facts))
    differences = [
        f"{name}: manifest {_shown(written[name])}, files {_shown(found[name])}"
        for name in written
        if written[name] != found[name]
    ]
    if differences:
        raise DataError(
            f"{manifest_path(prefix)} is not the manifest of {prefix}.bin and .idx:"
            f" {'; '.join(differences)}; it must be of the very files; restore them, write them"
            " again with tools/preprocess_data.py, or remove the manifest"
        )


def check_tokenizer(prefix: str, manifest: TokenManifest, tokenizer: TokenizerIdentity) -> None:
    """Check that a token file was written with the tokenizer of the run.

    Raises:
        DataError: It was written with another one.
    """
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix} was written with {manifest.tokenizer_file} ({manifest.tokenizer_type},"
            f" SHA-256 {_shown(manifest.tokenizer_sha256)}), but the model's tokenizer is"
            f" {tokenizer.path} ({tokenizer.kind}, SHA-256 {_shown(tokenizer.sha256)}); ids mean"
            " what the tokenizer that wrote them says; give that one with --tokenizer-model, or"
            " preprocess the data with this one; if both give the same ids, remove"
            f" {manifest_path(prefix)}"
        )


def check_vocabulary(
    prefix: str, manifest: TokenManifest, *, vocab_size: int, eod: int | None
) -> None:
    """Check a token file's ids, as its manifest has them, against the model and the run.

    Args:
        prefix: Of the token file.
        manifest: Its manifest.
        vocab_size: Token ids the model has an embedding for.
        eod: The id that the run takes for the end of a document; None where it knows none.

    Raises:
        DataError: They do not fit.
    """
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{prefix} was written with a vocabulary of {manifest.vocab_size} ids"
            f" ({manifest.tokenizer_file}), but the model has {vocab_size}; it must have as many at"
            " least; raise --vocab-size, or preprocess the data with this model's tokenizer"
        )
    if eod is not None and manifest.eod_token_id not in (None, eod):
        raise DataError(
            f"documents of {prefix} were written with id {manifest.eod_token_id} at their end, but"
            f" this run takes {eod} for it (--eod-token-id, or else the tokenizer's); both must be"
            " the same; give the id that was written, or preprocess the data again"
        )


def _shown(value: object) -> object:
    """Return a value for a message, a digest cut short."""
    is_digest = isinstance(value, str) and len(value) > _SHOWN_DIGITS
    return value[:_SHOWN_DIGITS] if is_digest else value  # type: ignore[index]


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return what a field is in a manifest that was written before there was this field."""
    return None if field.default is dataclasses.MISSING else field.default


def _is_valid(name: str, value: Any) -> bool:
    """Return whether a value may stand under a field's name in a manifest."""
    if name == "eod_token_id" and value is None:
        return True
    if name == "sources":
        return isinstance(value, list | tuple) and all(isinstance(each, dict) for each in value)
    if name.startswith("num_") or name in ("vocab_size", "eod_token_id", "shard_index"):
        return type(value) is int and value >= 0
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _not_a_manifest(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} stands where the manifest of a token file does, but is none: {why}; rename or"
        " remove it"
    )
