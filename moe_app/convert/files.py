"""What goes with the weights in a conversion: configs, the tokenizer, special token ids."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import DataConfig, TrainingConfig
from megatron.trainer.data.tokenizer import END_OF_DOCUMENT, TOKENIZERS, load_tokenizer
from megatron.trainer.errors import CheckpointError, DataError
from megatron.trainer.hf_files.directory import CONFIG_NAME, read_entry, read_json
from megatron.trainer.records.run_dir import CONFIG_NAME as RUN_CONFIG_NAME
from megatron.trainer.resume import RUN_NAME, WEIGHTS_ONLY
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.convert import Family

logger = logging.getLogger("convert")

KEPT_CONFIG_NAME = "hf_config.json"
"""Under this name a native checkpoint keeps the config.json that it was imported with."""

_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_SENTENCEPIECE = "tokenizer.model"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = {"HFTokenizer": "tokenizer.json", "SentencePieceTokenizer": _SENTENCEPIECE}
_MAX_SEQ_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Files beside the weights of a Hugging Face checkpoint."""

    files: Mapping[str, bytes]
    """Contents by name."""
    tokenizer_type: str | None
    """The kind of the tokenizer that the trainer can use, a name in TOKENIZERS; None: none."""


def read_companions(directory: Path) -> Companions:
    """Read the tokenizer and generation files of a checkpoint directory, of either kind.

    Raises:
        CheckpointError: one is damaged, or a link to a file of somebody else.
    """
    files = {}
    for name in (*_JSON_FILES, _SENTENCEPIECE, _TEMPLATE):
        path = directory / name
        if not os.path.lexists(path):
            continue
        _check_own(path)
        files[name] = read_entry(directory, name)
    for name in _JSON_FILES:
        if name in files:
            read_json(directory, name)
    kind = None
    for candidate, name in _TOKENIZER_FILES.items():
        if name in files and kind is None:
            kind = candidate if _can_load(candidate, directory / name) else None
    if kind is None:
        logger.warning(
            "%s brings no tokenizer that the trainer can use; name one with --tokenizer-model when"
            " it is needed",
            directory,
        )
    return Companions(files=files, tokenizer_type=kind)


def native_files(
    model: MoEModelConfig,
    hf_config: Mapping[str, Any],
    companions: Companions,
    *,
    checkpoint: Path,
    is_bf16: bool,
    source: str,
) -> dict[str, str | bytes]:
    """The small files of a native checkpoint made from a Hugging Face one.

    Args:
        model: the architecture.
        hf_config: contents of config.json.
        companions: files that go along.
        checkpoint: where the checkpoint will be.
        is_bf16: whether its weights are bfloat16.
        source: what it was made of, for the record.
    """
    kind = companions.tokenizer_type
    cfg = PretrainConfig(
        model=model,
        training=TrainingConfig(
            seq_length=min(_max_positions(hf_config) or _MAX_SEQ_LENGTH, _MAX_SEQ_LENGTH),
            bf16=is_bf16,
        ),
        data=DataConfig()
        if kind is None
        else DataConfig(
            tokenizer_type=kind,  # type: ignore[arg-type]  # a name in TOKENIZERS
            tokenizer_model=str(checkpoint / _TOKENIZER_FILES[kind]),
        ),
    )
    run = {WEIGHTS_ONLY: True, "iteration": 0, "imported_from": source}
    return {
        **companions.files,
        KEPT_CONFIG_NAME: json.dumps(dict(hf_config), indent=2) + "\n",
        RUN_CONFIG_NAME: dump_config(cfg),
        RUN_NAME: json.dumps(run, indent=2) + "\n",
    }


def hf_files(
    family: Family,
    cfg: PretrainConfig,
    checkpoint: Path,
    *,
    like: Path | None,
    dtype: str,
) -> dict[str, bytes]:
    """The small files of a Hugging Face checkpoint made from a native one.

    Args:
        family: of the model.
        cfg: of the run that wrote the checkpoint.
        checkpoint: the checkpoint; one that was imported keeps its former config.json.
        like: a Hugging Face directory to take tokenizer and token ids from instead; may be None.
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        CheckpointError: the family cannot express the model, or a file is damaged.
    """
    if like is not None:
        known, companions = read_json(like, CONFIG_NAME), read_companions(like)
    else:
        is_kept = (checkpoint / KEPT_CONFIG_NAME).exists()
        known = read_json(checkpoint, KEPT_CONFIG_NAME) if is_kept else {}
        companions = read_companions(checkpoint) if is_kept else _trained_with(cfg, checkpoint)
    ids = {f"{name}_token_id": known.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if not known and companions.tokenizer_type is not None:
        name = Path(cfg.data.tokenizer_model or "").name
        ids["eos_token_id"] = load_tokenizer(cfg.data.tokenizer_type, str(checkpoint / name)).eod
    longest = max(_max_positions(known) or 0, cfg.training.seq_length)
    try:
        config = family.hf_config(
            cfg.model,
            max_position_embeddings=longest,
            dtype=dtype,
            bos_token_id=ids["bos_token_id"],
            eos_token_id=ids["eos_token_id"],
            pad_token_id=ids["pad_token_id"],
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error
    return {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(), **companions.files}


def _trained_with(cfg: PretrainConfig, checkpoint: Path) -> Companions:
    """The tokenizer that a run of our own carried along, under the names transformers looks for."""
    if cfg.data.tokenizer_model is None or cfg.data.mock_data:  # mock data carries none along
        return Companions(files={}, tokenizer_type=None)
    kind = cfg.data.tokenizer_type
    carried = Path(cfg.data.tokenizer_model).name
    _check_own(checkpoint / carried)
    files = {_TOKENIZER_FILES[kind]: read_entry(checkpoint, carried)}
    if kind == "HFTokenizer":
        told = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_DOCUMENT,
            "model_max_length": cfg.training.seq_length,
        }
        files["tokenizer_config.json"] = (json.dumps(told, indent=2) + "\n").encode()
    return Companions(files=files, tokenizer_type=kind)


def _check_own(path: Path) -> None:
    """Refuse a link that leads out of the directory, unless into the blobs of a Hub cache.

    These files are copied and given back on export: a link must not smuggle in another one.
    """
    target, home = Path(os.path.realpath(path)), path.parent.resolve()
    if home not in target.parents and home.parent.parent / "blobs" not in target.parents:
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the checkpoint; put the file itself there"
        )


def _can_load(kind: str, path: Path) -> bool:
    """Whether the trainer can use this tokenizer; says why not."""
    try:
        TOKENIZERS[kind](str(path))
    except DataError as error:
        logger.warning("%s is carried along, but the trainer cannot use it: %s", path.name, error)
        return False
    return True


def _max_positions(hf_config: Mapping[str, Any]) -> int | None:
    """The longest sequence that a config names.

    Raises:
        CheckpointError: it names something else.
    """
    value = hf_config.get("max_position_embeddings", hf_config.get("n_positions"))
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"max_position_embeddings is {value!r}; it must be a number of tokens, at least 1"
        )
    return value
