"""Makes what accompanies the weights of an export: config, tokenizer, special token ids."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.data.tokenizer_files import (
    IDENTITY_FILES,
    IMPORTED_CONFIG_NAME,
    TOKENIZER_FILES,
    canonical_type,
)
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.hf_files.directory import CONFIG_NAME, read_entry, read_json
from moe_app.convert.files import check_link, max_positions, read_auxiliary_files
from moe_app.convert.sentencepiece_json import tokenizer_json
from moe_app.convert.tokenizer_check import check_tokenizer
from moe_app.pretrain.config import PretrainConfig
from moe_ext.convert import Family

logger = logging.getLogger("convert")

_JSON = TOKENIZER_FILES["HFTokenizer"]
_SETTINGS = "tokenizer_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMED = ("bos_token", "unk_token", "pad_token", "chat_template")
"""What an export keeps of a tokenizer_config.json whose class it replaces."""


@dataclass(frozen=True, kw_only=True)
class ExportedFiles:
    """Holds the small files of an export."""

    files: Mapping[str, bytes]
    """Contents by name."""
    tokenizer: Tokenizer | None
    """The run's own, which the exported one was compared with; None without one."""
    report: Mapping[str, Any]
    """What the conversion's report says of them."""


def hf_files(
    family: Family,
    cfg: PretrainConfig,
    checkpoint: Path,
    *,
    like: Path | None,
    dtype: str,
    has_tokenizer: bool = True,
) -> ExportedFiles:
    """Make the small files of a Hugging Face checkpoint exported from a native one.

    Args:
        family: of the model.
        cfg: of the run that wrote the checkpoint.
        checkpoint: the checkpoint; an imported one keeps the original config.json.
        like: a Hugging Face directory to take tokenizer and token ids from instead; may be None.
        dtype: of the weights, "float32" or "bfloat16".
        has_tokenizer: export the tokenizer too; token ids stay in config.json either way.

    Raises:
        CheckpointError: the family cannot express the model, a file is corrupt, or transformers
            would make another tokenizer of what is exported.
    """
    imported = checkpoint / IMPORTED_CONFIG_NAME
    known = read_json(checkpoint, IMPORTED_CONFIG_NAME) if imported.exists() else {}
    tokenizer = _open_tokenizer(cfg, checkpoint)
    source = known if like is None else read_json(like, CONFIG_NAME)
    config = _config(family, cfg, checkpoint, source, dtype=dtype)
    if like is None and tokenizer is not None and "eos_token_id" not in source:
        config["eos_token_id"] = tokenizer.eod
    report: dict[str, Any] = {"changed": _changes(known, config)}
    files: dict[str, bytes] = {}
    if has_tokenizer:
        files = _tokenizer_files(cfg, checkpoint, tokenizer, like=like)
    if tokenizer is not None and _JSON in files:
        where = f"{checkpoint if like is None else like}, {_JSON}"
        report["tokenizer"] = check_tokenizer(files[_JSON], tokenizer, where=where)
        logger.info("%s gives the run's ids on all texts compared: %s", where, report["tokenizer"])
    elif not files:
        why = "as asked for" if not has_tokenizer else "the checkpoint has none"
        logger.warning("exported without a tokenizer: %s", why)
        report["tokenizer"] = None
    return ExportedFiles(
        files={CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), **files},
        tokenizer=tokenizer if _JSON in files else None,
        report=report,
    )


def _config(
    family: Family, cfg: PretrainConfig, checkpoint: Path, source: Mapping[str, Any], *, dtype: str
) -> dict[str, Any]:
    """Return config.json; token ids and the longest sequence as `source` has them."""
    longest = max(max_positions(source) or 0, cfg.training.seq_length)
    try:
        return family.hf_config(
            cfg.model,
            max_position_embeddings=longest,
            dtype=dtype,
            **{name: source.get(name) for name in _IDS},
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error


def _changes(known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List, and log, what an export says otherwise than the import that the run began with."""
    changed = {
        name: [known.get(name), config.get(name)]
        for name in (*_IDS, "max_position_embeddings")
        if name in known and known[name] != config.get(name)
    }
    for name, (before, after) in changed.items():
        logger.warning("the export changes %s: %s -> %s", name, before, after)
    return changed


def _open_tokenizer(cfg: PretrainConfig, checkpoint: Path) -> Tokenizer | None:
    """Open the tokenizer in a run's checkpoint; None if it has none that the trainer can use."""
    if cfg.data.tokenizer_model is None or cfg.data.mock_data:  # runs on mock data save none
        return None
    kind = canonical_type(cfg.data.tokenizer_type)
    path = checkpoint / Path(cfg.data.tokenizer_model).name
    if not path.is_file():
        path = checkpoint / TOKENIZER_FILES[kind]
    check_link(path)
    try:
        return load_tokenizer(kind, str(path), eod_token=cfg.data.eod_token)
    except DataError as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error


def _tokenizer_files(
    cfg: PretrainConfig, checkpoint: Path, tokenizer: Tokenizer | None, *, like: Path | None
) -> dict[str, bytes]:
    """Return tokenizer and what lies beside it, in the form that transformers reads."""
    if like is not None:
        return dict(read_auxiliary_files(like).files)
    if tokenizer is None:
        imported = (checkpoint / IMPORTED_CONFIG_NAME).exists()
        return dict(read_auxiliary_files(checkpoint).files) if imported else {}
    files = {}
    for name in IDENTITY_FILES:
        if os.path.lexists(checkpoint / name):
            check_link(checkpoint / name)
            files[name] = read_entry(checkpoint, name)
    own = Path(cfg.data.tokenizer_model or "").name
    own = own if (checkpoint / own).is_file() else TOKENIZER_FILES[cfg.data.tokenizer_type]
    content = read_entry(checkpoint, own)
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            files[_JSON] = tokenizer_json(content, tokenizer)
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint / own} cannot be exported, because {error}; transformers would give"
                " other ids than the model was trained on; export with --no-tokenizer, and with"
                " it run only ids that the project's own tools made"
            ) from error
        files[_SETTINGS] = _settings(cfg, tokenizer, files.get(_SETTINGS))
    else:
        files[_JSON] = content
        if _SETTINGS not in files:
            files[_SETTINGS] = _settings(cfg, tokenizer, None)
    return files


def _settings(cfg: PretrainConfig, tokenizer: Tokenizer, carried: bytes | None) -> bytes:
    """Return a tokenizer_config.json whose class takes tokenizer.json as it is.

    Args:
        cfg: of the run.
        tokenizer: the run's own.
        carried: the file beside it; its token names and its chat template stay.
    """
    known = {} if carried is None else json.loads(carried)
    kept = {name: known[name] for name in _NAMED if known.get(name)}
    if tokenizer.prefix:
        kept["bos_token"] = tokenizer.token_text(tokenizer.prefix[0])
    settings = {
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end.text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": known.get("model_max_length", cfg.training.seq_length),
    }
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
