"""Reads what accompanies the weights of an import: configs, tokenizer, special token ids."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.checkpoint.saved_run import RUN_NAME, WEIGHTS_ONLY
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import DataConfig, TrainingConfig
from megatron.trainer.data.tokenizer import TOKENIZERS
from megatron.trainer.data.tokenizer_files import (
    IDENTITY_FILES,
    IMPORTED_CONFIG_NAME,
    JSON_FILES,
    TOKENIZER_FILES,
)
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.hf_files.directory import read_entry, read_json
from megatron.trainer.records.run_dir import CONFIG_NAME as RUN_CONFIG_NAME
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig

logger = logging.getLogger("convert")

_MAX_SEQ_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class AuxiliaryFiles:
    """Holds the files beside the weights of a Hugging Face checkpoint."""

    files: Mapping[str, bytes]
    """Contents by name."""
    tokenizer_type: str | None
    """Type of the tokenizer that the trainer can use, a name in TOKENIZERS; None if there is
    none."""


def read_auxiliary_files(directory: Path, *, eod_token: str | None = None) -> AuxiliaryFiles:
    """Read tokenizer and generation files of a Hugging Face or native checkpoint.

    Args:
        directory: has them.
        eod_token: the end of a document that the config of a native one states.

    Raises:
        CheckpointError: one is corrupt, or a symlink out of the directory.
    """
    files = {}
    for name in (*TOKENIZER_FILES.values(), *IDENTITY_FILES):
        path = directory / name
        if not os.path.lexists(path):
            continue
        check_link(path)
        files[name] = read_entry(directory, name)
    for name in (TOKENIZER_FILES["HFTokenizer"], *JSON_FILES):
        if name in files:
            read_json(directory, name)
    kind = None
    for candidate, name in TOKENIZER_FILES.items():
        if name in files and kind is None:
            kind = candidate if _can_load(candidate, directory / name, eod_token) else None
    if kind is None:
        logger.warning(
            "%s has no tokenizer that the trainer can use; name one with --tokenizer-model when"
            " one is needed",
            directory,
        )
    return AuxiliaryFiles(files=files, tokenizer_type=kind)


def native_files(
    model: MoEModelConfig,
    hf_config: Mapping[str, Any],
    auxiliary: AuxiliaryFiles,
    *,
    checkpoint: Path,
    is_bf16: bool,
    source: str,
) -> dict[str, str | bytes]:
    """Return the small files of a native checkpoint imported from Hugging Face.

    Args:
        model: the architecture.
        hf_config: contents of config.json.
        auxiliary: tokenizer and generation files.
        checkpoint: where the checkpoint will be.
        is_bf16: whether its weights are bfloat16.
        source: where it was imported from, for the record.
    """
    kind = auxiliary.tokenizer_type
    cfg = PretrainConfig(
        model=model,
        training=TrainingConfig(
            seq_length=min(max_positions(hf_config) or _MAX_SEQ_LENGTH, _MAX_SEQ_LENGTH),
            bf16=is_bf16,
        ),
        data=DataConfig()
        if kind is None
        else DataConfig(
            tokenizer_type=kind,  # type: ignore[arg-type]  # a name in TOKENIZERS
            tokenizer_model=str(checkpoint / TOKENIZER_FILES[kind]),
        ),
    )
    run = {WEIGHTS_ONLY: True, "iteration": 0, "imported_from": source}
    return {
        **auxiliary.files,
        IMPORTED_CONFIG_NAME: json.dumps(dict(hf_config), indent=2) + "\n",
        RUN_CONFIG_NAME: dump_config(cfg),
        RUN_NAME: json.dumps(run, indent=2) + "\n",
    }


def check_link(path: Path) -> None:
    """Refuse a symlink out of the directory, except into the blobs of a Hub cache.

    These files are copied and exported again: a link must not leak another file.
    """
    target, home = Path(os.path.realpath(path)), path.parent.resolve()
    if home not in target.parents and home.parent.parent / "blobs" not in target.parents:
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the checkpoint; put the file itself there"
        )


def _can_load(kind: str, path: Path, eod_token: str | None) -> bool:
    """Return whether the trainer can use this tokenizer; log the reason if not."""
    try:
        TOKENIZERS[kind](str(path), eod_token=eod_token)
    except DataError as error:
        logger.warning("%s is copied, but the trainer cannot use it: %s", path.name, error)
        return False
    return True


def max_positions(hf_config: Mapping[str, Any]) -> int | None:
    """Return the maximum sequence length of a config.

    Raises:
        CheckpointError: it is not a length.
    """
    value = hf_config.get("max_position_embeddings", hf_config.get("n_positions"))
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"max_position_embeddings is {value!r}; it must be a number of tokens, at least 1"
        )
    return value
