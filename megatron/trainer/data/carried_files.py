"""Collects what every checkpoint of a run keeps beside its state: tokenizer, and import's files.

A checkpoint is read without the directory that its run took them from.
"""

import dataclasses
import json
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.data.tokenizer_files import (
    CARRIED_FILES,
    IDENTITY_FILES,
    IMPORTED_CONFIG_NAME,
    MODEL_CONFIGS,
    TOKENIZER_FILES,
    TokenizerFile,
    locate_tokenizer,
    parse_object,
    read_beside,
    read_tokenizer_file,
)
from megatron.trainer.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CarriedFiles:
    """Holds what the checkpoints of a run keep beside its state."""

    files: Mapping[str, bytes]
    """Contents by name."""
    data: DataConfig
    """The run's settings as its checkpoints state them: the tokenizer's own type and file, and the
    end of a document where the files do not tell it."""


def collect_files(
    data: DataConfig,
    loaded: Path | None = None,
    saved: Mapping[str, Any] = types.MappingProxyType({}),
) -> CarriedFiles:
    """Read the files that a run's checkpoints keep.

    They are the tokenizer that the run names, with the files beside it that say what its tokens are
    for, and those that the checkpoint it began from has. Where that one has another tokenizer, what
    belongs to it is left out, and the log says so.

    Args:
        data: the run's settings.
        loaded: the checkpoint that it began from; None for none.
        saved: the flat config of the run that wrote it.

    Raises:
        ConfigError: `--eod-token` is given, and there is no tokenizer.
        DataError: a file is missing or cannot be read, or `--eod-token` is no token of it.
    """
    carried = {} if loaded is None else _read_loaded(loaded, saved)
    if data.tokenizer_model is None or data.mock_data:
        _log_carried(carried, loaded)
        if data.eod_token is not None and not data.mock_data and not _has_tokenizer(carried):
            raise ConfigError(
                f"--eod-token {data.eod_token!r} is a token of no tokenizer, because the run has"
                " none; give --tokenizer-model, or drop it"
            )
        end = data.eod_token or saved.get("eod_token")
        settings = dataclasses.replace(data, eod_token=end if isinstance(end, str) else None)
        return CarriedFiles(files=carried, data=settings)
    file = locate_tokenizer(data.tokenizer_type, data.tokenizer_model)
    content = read_tokenizer_file(file.path)
    own = {file.path.name: content, **_read_all(file.path.parent, IDENTITY_FILES)}
    is_other = carried.get(TOKENIZER_FILES[file.kind]) != content
    if loaded is not None and _has_tokenizer(carried) and is_other:
        carried = _without_tokenizer(carried, file, loaded)
    _log_carried({name: each for name, each in carried.items() if name not in own}, loaded)
    changed = [name for name in own if name in carried and carried[name] != own[name]]
    if changed:
        logger.info("%s beside %s replaces that of %s", ", ".join(changed), file.path, loaded)
    settings = dataclasses.replace(
        data,
        tokenizer_type=file.kind,  # type: ignore[arg-type]  # a name in TOKENIZER_FILES
        tokenizer_model=str(file.path),
        eod_token=_end_to_state(data, file),
    )
    usual = TOKENIZER_FILES[file.kind]
    if IMPORTED_CONFIG_NAME in carried:
        own[usual] = content  # an export takes all that was imported under its usual names
    elif file.path.name != usual:
        carried.pop(usual, None)
    return CarriedFiles(files={**carried, **own}, data=settings)


def _read_all(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return those files of a directory that are there."""
    contents = {name: read_beside(directory, name) for name in names}
    return {name: content for name, content in contents.items() if content is not None}


def _read_loaded(loaded: Path, saved: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what the checkpoint that a run began from keeps.

    Its tokenizer may have a name of its own there; it gets the usual one.
    """
    contents = _read_all(loaded, CARRIED_FILES)
    kind, model = saved.get("tokenizer_type"), saved.get("tokenizer_model")
    if kind in TOKENIZER_FILES and isinstance(model, str):
        content = read_beside(loaded, Path(model).name) if Path(model).name else None
        if content is not None:
            contents[TOKENIZER_FILES[kind]] = content
    return contents


def _has_tokenizer(files: Mapping[str, bytes]) -> bool:
    return any(name in files for name in TOKENIZER_FILES.values())


def _without_tokenizer(
    carried: Mapping[str, bytes], file: TokenizerFile, loaded: Path
) -> dict[str, bytes]:
    """Return what a checkpoint says of its model apart from the tokenizer."""
    kept = {}
    if IMPORTED_CONFIG_NAME in carried:
        config = parse_object(loaded / IMPORTED_CONFIG_NAME, carried[IMPORTED_CONFIG_NAME])
        left = {key: value for key, value in config.items() if not key.endswith("_token_id")}
        kept[IMPORTED_CONFIG_NAME] = (json.dumps(left, indent=2) + "\n").encode()
    logger.warning(
        "%s is another tokenizer than that of %s: the checkpoints of this run keep the new one, and"
        " leave out %s%s",
        file.path,
        loaded,
        ", ".join(name for name in carried if name not in kept),
        f" and the token ids of {IMPORTED_CONFIG_NAME}" if kept else "",
    )
    return kept


def _log_carried(carried: Mapping[str, bytes], loaded: Path | None) -> None:
    if carried:
        logger.info("the checkpoints of this run keep %s of %s", ", ".join(carried), loaded)


def _end_to_state(data: DataConfig, file: TokenizerFile) -> str | None:
    """Return the end of a document where the files in a checkpoint would not tell it.

    Raises:
        DataError: `--eod-token` is no token of the tokenizer.
    """
    if data.eod_token is not None:
        load_tokenizer(file.kind, str(file.path), eod_token=data.eod_token)
        return data.eod_token
    if not any((file.path.parent / name).exists() for name in MODEL_CONFIGS):
        return None
    try:
        end = load_tokenizer(file.kind, str(file.path)).end
    except DataError:  # training needs no end; what does will say so
        return None
    return end.text if end.named_by in MODEL_CONFIGS else None
