"""Convert what accompanies the weights: configs, tokenizer, special token ids."""

import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.checkpoint.saved_run import RUN_NAME, WEIGHTS_ONLY
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import DataConfig, TrainingConfig
from megatron.trainer.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from megatron.trainer.data.tokenizer_files import (
    IDENTITY_FILES,
    IMPORTED_CONFIG_NAME,
    JSON_FILES,
    TOKENIZER_FILES,
    canonical_type,
)
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.hf_files.directory import CONFIG_NAME, read_entry, read_json
from megatron.trainer.io.bounded_read import target_outside
from megatron.trainer.records.run_dir import CONFIG_NAME as RUN_CONFIG_NAME
from moe_app.convert.export_changes import log_changes
from moe_app.convert.exported_tokenizer import (
    GENERATION_NAME,
    SETTINGS_NAME,
    check_tokenizer,
    make_tokenizer_files,
    token_ids,
)
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.convert import Family

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

    @property
    def has_tokenizer(self) -> bool:
        """Return whether there is a tokenizer of any type."""
        return any(name in self.files for name in TOKENIZER_FILES.values())


def read_auxiliary_files(directory: Path, *, eod_token: str | None = None) -> AuxiliaryFiles:
    """Read tokenizer and generation files of a Hugging Face or native checkpoint.

    Args:
        directory: has them.
        eod_token: the end of a document that the config of a native one states.

    Raises:
        CheckpointError: one is corrupt, or a symlink out of the directory.
    """
    files = read_those_there(directory, (*TOKENIZER_FILES.values(), *IDENTITY_FILES))
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
    cfg = native_config(model, hf_config, auxiliary, directory=checkpoint, is_bf16=is_bf16)
    run = {WEIGHTS_ONLY: True, "iteration": 0, "imported_from": source}
    return {
        **auxiliary.files,
        IMPORTED_CONFIG_NAME: json.dumps(dict(hf_config), indent=2) + "\n",
        RUN_CONFIG_NAME: dump_config(cfg),
        RUN_NAME: json.dumps(run, indent=2) + "\n",
    }


def native_config(
    model: MoEModelConfig,
    hf_config: Mapping[str, Any],
    auxiliary: AuxiliaryFiles,
    *,
    directory: Path,
    is_bf16: bool,
) -> PretrainConfig:
    """Return the config of a run that would have written a Hugging Face checkpoint.

    Args:
        model: the architecture.
        hf_config: contents of config.json.
        auxiliary: tokenizer and generation files.
        directory: where these files are, or will be.
        is_bf16: whether the weights are bfloat16.
    """
    kind = auxiliary.tokenizer_type
    return PretrainConfig(
        model=model,
        training=TrainingConfig(
            seq_length=min(_max_positions(hf_config) or _MAX_SEQ_LENGTH, _MAX_SEQ_LENGTH),
            bf16=is_bf16,
        ),
        data=DataConfig()
        if kind is None
        else DataConfig(
            tokenizer_type=kind,  # type: ignore[arg-type]  # a name in TOKENIZERS
            tokenizer_model=str(directory / TOKENIZER_FILES[kind]),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ExportedFiles:
    """Holds the small files of an export."""

    files: Mapping[str, bytes]
    """Contents by name."""
    tokenizer: Tokenizer | None
    """The trainer's tokenizer, whose ids the exported one gives; None where none is exported, or
    the trainer cannot use it."""
    report: Mapping[str, Any]
    """What was compared and changed, for the report."""


def hf_files(
    family: Family,
    cfg: PretrainConfig,
    checkpoint: Path,
    *,
    like: Path | None,
    dtype: str,
    with_tokenizer: bool = True,
) -> ExportedFiles:
    """Return the small files of a Hugging Face checkpoint exported from a native one.

    Args:
        family: of the model.
        cfg: of the run that wrote the checkpoint.
        checkpoint: the checkpoint; an imported one keeps the original config.json.
        like: a Hugging Face directory to take tokenizer and token ids from instead; may be None.
        dtype: of the weights, "float32" or "bfloat16".
        with_tokenizer: whether to export the tokenizer.

    Raises:
        CheckpointError: the family cannot express the model, a file is corrupt, or the tokenizer
            cannot be exported so that it gives the same ids.
    """
    source = like or checkpoint
    is_imported = like is not None or (checkpoint / IMPORTED_CONFIG_NAME).exists()
    name = IMPORTED_CONFIG_NAME if like is None else CONFIG_NAME
    known = read_json(source, name) if is_imported else {}
    end = cfg.data.eod_token if like is None else None
    auxiliary = (
        read_auxiliary_files(source, eod_token=end)
        if is_imported
        else _run_tokenizer_files(cfg, checkpoint)
    )
    try:
        tokenizer = _open_tokenizer(cfg, checkpoint, like, auxiliary.tokenizer_type)
    except DataError as error:
        if with_tokenizer:
            raise CheckpointError(f"{error}; or export with --no-tokenizer") from error
        tokenizer = None
    longest = max(_max_positions(known) or 0, cfg.training.seq_length)
    files, report = _tokenizer_files(
        cfg,
        auxiliary,
        tokenizer,
        is_imported=is_imported,
        longest=longest,
        is_wanted=with_tokenizer,
    )
    ids = _token_ids(known, files, tokenizer, is_like=like is not None)
    try:
        config = family.hf_config(cfg.model, max_position_embeddings=longest, dtype=dtype, **ids)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error
    changes = log_changes(known, config, auxiliary.files, files) if is_imported else []
    named = {key: value for key, value in ids.items() if value is not None}
    if not is_imported and named:
        files.setdefault(GENERATION_NAME, _dump(named))
    return ExportedFiles(
        files={CONFIG_NAME: _dump(config), **files},
        tokenizer=tokenizer.tokenizer if tokenizer is not None and with_tokenizer else None,
        report={"tokenizer": report} | ({"changes": changes} if is_imported else {}),
    )


@dataclass(frozen=True, kw_only=True)
class _OpenTokenizer:
    """Holds the tokenizer of an export's source."""

    tokenizer: Tokenizer
    kind: str


def _tokenizer_files(
    cfg: PretrainConfig,
    auxiliary: AuxiliaryFiles,
    tokenizer: _OpenTokenizer | None,
    *,
    is_imported: bool,
    longest: int,
    is_wanted: bool,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the tokenizer and generation files of an export, and what the report says of them.

    Args:
        cfg: of the run.
        auxiliary: the files of the source.
        tokenizer: that of the source, as the trainer reads it; None if there is none.
        is_imported: whether the files are an import's.
        longest: tokens that the model takes.
        is_wanted: whether to export a tokenizer.
    """
    files = dict(auxiliary.files)
    generation = {each: files[each] for each in files if each == GENERATION_NAME}
    if not is_wanted:
        return generation, _without_tokenizer("--no-tokenizer was given")
    if tokenizer is not None:
        files = make_tokenizer_files(
            files,
            tokenizer.tokenizer,
            tokenizer.kind,
            is_imported=is_imported,
            max_length=longest,
        )
        return files, check_tokenizer(files, tokenizer.tokenizer, cfg.model.vocab_size).report()
    if TOKENIZER_FILES["HFTokenizer"] in files:
        files.pop(TOKENIZER_FILES["SentencePieceTokenizer"], None)
        return files, {"compared": False, "because": "the trainer cannot use it"}
    if auxiliary.has_tokenizer:  # a model file, of which transformers would make another one
        reason = "the trainer cannot use it, and nothing can be compared"
        return generation, _without_tokenizer(reason)
    return files, _without_tokenizer("the checkpoint has none")


def _open_tokenizer(
    cfg: PretrainConfig, checkpoint: Path, like: Path | None, kind: str | None
) -> _OpenTokenizer | None:
    """Open the tokenizer that texts were encoded with; None if there is none.

    Args:
        cfg: of the run.
        checkpoint: of the run.
        like: the directory that has the tokenizer instead; may be None.
        kind: of the first one in the directory that the trainer can use.
    """
    if kind is None:
        return None
    if like is not None:
        tokenizer = load_tokenizer(kind, str(like / TOKENIZER_FILES[kind]))
        return _OpenTokenizer(tokenizer=tokenizer, kind=kind)
    if cfg.data.tokenizer_model is not None and not cfg.data.mock_data:
        kind = canonical_type(cfg.data.tokenizer_type)
    path = checkpoint / _saved_name(cfg, checkpoint, kind)
    tokenizer = load_tokenizer(kind, str(path), eod_token=cfg.data.eod_token)
    return _OpenTokenizer(tokenizer=tokenizer, kind=kind)


def _token_ids(
    known: Mapping[str, Any],
    files: Mapping[str, bytes],
    tokenizer: _OpenTokenizer | None,
    *,
    is_like: bool,
) -> dict[str, Any]:
    """Return the ids of special tokens for config.json: the import's, else the tokenizer's."""
    ids = {role: known.get(role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if is_like or tokenizer is None:
        return ids
    if not ids.keys() & known.keys() and SETTINGS_NAME in files:
        named = token_ids(files, tokenizer.tokenizer)
        ids |= {f"{role}_token_id": each for role, each in named.items()}
    if "eos_token_id" not in known:
        ids["eos_token_id"] = tokenizer.tokenizer.eod
    return ids


def _without_tokenizer(reason: str) -> dict[str, Any]:
    logger.warning("the export has no tokenizer: %s", reason)
    return {"exported": False, "because": reason}


def _dump(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()


def _run_tokenizer_files(cfg: PretrainConfig, checkpoint: Path) -> AuxiliaryFiles:
    """Return the tokenizer saved with a run, under the names transformers expects."""
    if cfg.data.tokenizer_model is None or cfg.data.mock_data:  # runs on mock data save none
        return AuxiliaryFiles(files={}, tokenizer_type=None)
    kind = canonical_type(cfg.data.tokenizer_type)
    tokenizer = _read_file(checkpoint, _saved_name(cfg, checkpoint, kind))
    files = {TOKENIZER_FILES[kind]: tokenizer, **read_those_there(checkpoint, IDENTITY_FILES)}
    return AuxiliaryFiles(files=files, tokenizer_type=kind)


def _saved_name(cfg: PretrainConfig, checkpoint: Path, kind: str) -> str:
    """Return the name that a run's checkpoint has its tokenizer under: its own, or the usual."""
    own = Path(cfg.data.tokenizer_model or "").name
    return own if own and os.path.lexists(checkpoint / own) else TOKENIZER_FILES[kind]


def read_those_there(directory: Path, names: Collection[str]) -> dict[str, bytes]:
    """Return the contents of those of some files that a directory has."""
    return {
        name: _read_file(directory, name) for name in names if os.path.lexists(directory / name)
    }


def _read_file(directory: Path, name: str) -> bytes:
    """Return a file's content, unless it is a symlink out of the directory.

    These files are copied and exported again: a link must not leak another file.
    """
    target = target_outside(directory / name)
    if target is not None:
        raise CheckpointError(
            f"{directory / name} is a link to {target}, outside of the checkpoint; put the file"
            " itself there"
        )
    return read_entry(directory, name)


def _can_load(kind: str, path: Path, eod_token: str | None) -> bool:
    """Return whether the trainer can use this tokenizer; log the reason if not."""
    try:
        TOKENIZERS[kind](str(path), eod_token=eod_token)
    except DataError as error:
        logger.warning("%s is copied, but the trainer cannot use it: %s", path.name, error)
        return False
    return True


def _max_positions(hf_config: Mapping[str, Any]) -> int | None:
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
