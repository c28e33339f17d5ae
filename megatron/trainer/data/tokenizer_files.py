"""Finds a tokenizer's file, and reads the files beside it that say what its tokens are for."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.bounded_read import read_small, target_outside

IMPORTED_CONFIG_NAME = "hf_config.json"
"""File in a native checkpoint that keeps the config.json it was imported with."""
TOKENIZER_FILES = {"HFTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}
"""The name that the file of each type has in a directory."""
TYPE_ALIASES = {"HuggingFaceTokenizer": "HFTokenizer"}
"""Megatron-LM's names of types, by which --tokenizer-type takes them, too."""
TOKENIZER_TYPES = ("SentencePieceTokenizer", "HFTokenizer")
"""What --tokenizer-type may be, apart from the aliases."""
JSON_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""JSON objects that say what the tokens of a tokenizer beside them are for."""
IDENTITY_FILES = (*JSON_FILES, "chat_template.jinja")
"""What belongs to a tokenizer beside its own file."""
CARRIED_FILES = (*TOKENIZER_FILES.values(), *IDENTITY_FILES, IMPORTED_CONFIG_NAME)
"""What an import brings, and every checkpoint of a run that continues it keeps."""

MOST_BYTES = 1 << 28
"""Of one such file."""
MODEL_CONFIGS = (IMPORTED_CONFIG_NAME, "config.json")
"""The model's config beside a tokenizer: in a native checkpoint, in a Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """Names a tokenizer's file."""

    kind: str
    """Its type, a name in TOKENIZER_FILES."""
    path: Path
    """Where it is."""


def canonical_type(tokenizer_type: str) -> str:
    """Return the project's own name of a type.

    Raises:
        ConfigError: The type is unknown.
    """
    kind = TYPE_ALIASES.get(tokenizer_type, tokenizer_type)
    if kind not in TOKENIZER_FILES:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} is unknown; it must be one of"
            f" {', '.join(TOKENIZER_TYPES)}"
        )
    return kind


def locate_tokenizer(tokenizer_type: str, tokenizer_model: str | None) -> TokenizerFile:
    """Find the file that `--tokenizer-type` and `--tokenizer-model` mean.

    A directory holds it as tokenizer.json or tokenizer.model, by the type; where only the other
    type's is there, it is that one.

    Raises:
        ConfigError: The type is unknown, or no file is named.
        DataError: The directory holds neither.
    """
    kind = canonical_type(tokenizer_type)
    if not tokenizer_model:
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} needs a file, but --tokenizer-model is not given;"
            " name the .model or .json file"
        )
    path = Path(tokenizer_model)
    if not path.is_dir():
        return TokenizerFile(kind=kind, path=path)
    for candidate in (kind, *TOKENIZER_FILES):
        file = path / TOKENIZER_FILES[candidate]
        if os.path.lexists(file):
            return TokenizerFile(kind=candidate, path=file)
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:20])
    raise DataError(
        f"{path} holds no tokenizer: neither {' nor '.join(TOKENIZER_FILES.values())}; it holds"
        f" {there or 'nothing'}; name another directory or the file itself with --tokenizer-model"
    )


def read_tokenizer_file(path: str | Path) -> bytes:
    """Return a tokenizer file's content.

    Raises:
        DataError: It is missing, no regular file, or too large.
    """
    if not Path(path).is_file():
        raise DataError(
            f"tokenizer {path} does not exist or is not a file; --tokenizer-model must name the"
            " .model or .json file; check the path"
        )
    try:
        return read_small(Path(path), most_bytes=MOST_BYTES)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read: {error.strerror}; --tokenizer-model must name the"
            " .model or .json file; check the path"
        ) from error


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Turn what the libraries say of a damaged file, or of one of another kind, into a DataError.

    They raise Exception itself, and the one that is written in Rust, where it gives up, a
    PanicException of its own that is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"tokenizer {path} is not {kind} ({error}); --tokenizer-type and --tokenizer-model must"
            f" agree ({', '.join(TOKENIZER_TYPES)}); choose the other type or restore the file"
        ) from error


def read_beside(directory: Path, name: str) -> bytes | None:
    """Return a file of a directory; None where it is not there.

    Raises:
        DataError: It cannot be read, or is a link out of the directory: these files are copied
            into checkpoints and exported, and a link must not leak another file.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    target = target_outside(path)
    if target is not None:
        raise DataError(
            f"{path} is a link to {target}, outside of its directory; put the file itself there"
        )
    try:
        return read_small(path, most_bytes=MOST_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; it says what tokens of the tokenizer beside"
            " it are for; restore it, or move it away"
        ) from error


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Holds what the JSON files beside a tokenizer say of its tokens."""

    directory: Path
    """Where they are."""
    files: Mapping[str, Mapping[str, Any]]
    """The objects, by file name."""

    def named_text(self, role: str) -> tuple[str, str] | None:
        """Return the file that names a `bos`, `eos`, `pad` or `unk` token, and the token's text."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            text = token_text(self.files.get(name, {}).get(f"{role}_token"))
            if text:
                return name, text
        return None

    def named_ids(self, role: str) -> list[tuple[str, int]]:
        """Return the ids that the configs of generation and model give a role, each with its file.

        A config may give one id or a list.
        """
        found = []
        for name in ("generation_config.json", *MODEL_CONFIGS):
            value = self.files.get(name, {}).get(f"{role}_token_id")
            values = value if isinstance(value, list) else [value]
            found += [(name, each) for each in values if type(each) is int and each >= 0]
        return found

    def special_texts(self) -> set[str]:
        """Return the tokens that the tokenizer's own settings call special."""
        found: set[str] = set()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = self.files.get(name, {})
            values = [value for key, value in settings.items() if key.endswith("_token")]
            for key in ("additional_special_tokens", "extra_special_tokens"):
                values += _values_of(settings.get(key))
            added = _values_of(settings.get("added_tokens_decoder"))
            values += [each for each in added if isinstance(each, dict) and each.get("special")]
            found |= {text for value in values if (text := token_text(value))}
        return found

    @property
    def adds_bos(self) -> bool | None:
        """Return what tokenizer_config.json says of a BOS before each text; None for nothing."""
        value = self.files.get("tokenizer_config.json", {}).get("add_bos_token")
        return value if isinstance(value, bool) else None

    @property
    def tokenizer_class(self) -> str | None:
        """Return the class that tokenizer_config.json names."""
        value = self.files.get("tokenizer_config.json", {}).get("tokenizer_class")
        return value if isinstance(value, str) else None


def read_settings(directory: Path) -> TokenizerSettings:
    """Read what lies beside a tokenizer.

    Raises:
        DataError: A file cannot be read, or is no JSON object.
    """
    files: dict[str, Mapping[str, Any]] = {}
    for name in (*JSON_FILES, *MODEL_CONFIGS):
        content = read_beside(directory, name)
        if content is not None:
            files[name] = parse_object(directory / name, content)
    return TokenizerSettings(directory=directory, files=files)


def parse_object(path: Path, content: bytes) -> Mapping[str, Any]:
    """Return the JSON object in a file beside a tokenizer.

    Raises:
        DataError: It is something else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({error}), but it says what tokens of the tokenizer beside it are"
            " for; restore it, or move it away"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds a {type(found).__name__}, not a JSON object, but it says what tokens of"
            " the tokenizer beside it are for; restore it, or move it away"
        )
    return found


def _values_of(value: object) -> list[Any]:
    """Return the members of a list or an object, none of anything else."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def token_text(value: object) -> str | None:
    """Return the text of a token, which files write alone or in an object; None for no token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
