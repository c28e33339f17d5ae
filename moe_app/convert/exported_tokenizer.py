"""Makes the tokenizer files of an export, and compares what they give before it is called good."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.tokenizer_files import TOKENIZER_FILES, token_text
from megatron.trainer.errors import CheckpointError
from moe_app.convert.sentencepiece_json import to_tokenizer_json
from moe_app.convert.tokenizer_check import TokenizerComparison, compare_with_file

logger = logging.getLogger("convert")

JSON_NAME, MODEL_NAME = TOKENIZER_FILES["HFTokenizer"], TOKENIZER_FILES["SentencePieceTokenizer"]
SETTINGS_NAME, MAP_NAME = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_NAME = "generation_config.json"

_CLASS = "PreTrainedTokenizerFast"
_ROLES = ("bos", "eos", "pad")
_OTHER_CLASSES = (
    "add_bos_token",
    "add_dummy_prefix_space",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "auto_map",
    "backend",
    "from_slow",
    "is_local",
    "legacy",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "tokenizer_file",
    "unk_token",
    "use_default_system_prompt",
    "use_fast",
    "vocab_file",
)
"""Settings of transformers' classes for SentencePiece models, which would change a tokenizer.json.

`<unk>` is left out because a text that spells it would become it."""


def make_tokenizer_files(
    files: Mapping[str, bytes],
    tokenizer: Tokenizer,
    kind: str,
    *,
    is_imported: bool,
    max_length: int,
) -> dict[str, bytes]:
    """Return the files from which transformers makes the trainer's tokenizer.

    A tokenizer.model is replaced: transformers makes another tokenizer from it.

    Args:
        files: the tokenizer and what is beside it, by name.
        tokenizer: made from them.
        kind: of it, a name in TOKENIZER_FILES.
        is_imported: whether they are an import's, whose settings stay as they are.
        max_length: tokens that the model takes.

    Raises:
        CheckpointError: transformers cannot be given the same tokenizer.
    """
    made = dict(files)
    settings = json.loads(files[SETTINGS_NAME]) if SETTINGS_NAME in files else {}
    if kind == "HFTokenizer":
        if is_imported and SETTINGS_NAME in files:
            return made
        roles = {"eos": tokenizer.end.text}
    else:
        model = made.pop(MODEL_NAME)
        roles = {**_own_roles(model), "eos": tokenizer.end.text}
        prefix = [text for each in tokenizer.prefix if (text := tokenizer.token_text(each))]
        try:
            made[JSON_NAME] = to_tokenizer_json(
                model, control=tokenizer.control_texts(), prefix=prefix
            )
        except ValueError as error:
            raise _no_equal(f"{error}, which a tokenizer.json cannot give exactly") from error
        settings = {key: value for key, value in settings.items() if key not in _OTHER_CLASSES}
        settings["tokenizer_class"] = _CLASS
        if MAP_NAME in files:  # the same tokens as in the settings, and `<unk>`
            listed = json.loads(made.pop(MAP_NAME))
            # tokenizer_config.json takes tokens as objects only with a type beside them.
            tokens = {key: token_text(each) or each for key, each in listed.items()}
            settings = {key: tokens[key] for key in tokens if key != "unk_token"} | settings
        made.pop("added_tokens.json", None)
    defaults = {
        "tokenizer_class": _CLASS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **{f"{role}_token": text for role, text in roles.items()},
    }
    stated = {key: value for key, value in settings.items() if value is not None}
    settings = _known_tokens({**defaults, **stated}, tokenizer)
    made[SETTINGS_NAME] = (json.dumps(settings, indent=2) + "\n").encode()
    return made


def check_tokenizer(
    files: Mapping[str, bytes], tokenizer: Tokenizer, num_rows: int
) -> TokenizerComparison:
    """Compare the trainer's tokenizer with the exported tokenizer.json.

    Args:
        files: of the export, by name.
        tokenizer: the trainer's.
        num_rows: of the model's embedding.

    Raises:
        CheckpointError: they differ, or have ids that the model does not.
    """
    if tokenizer.vocab_size > num_rows:
        raise _no_equal(f"it has {tokenizer.vocab_size} ids, and the model's embedding {num_rows}")
    found = compare_with_file(tokenizer, files[JSON_NAME])
    if not found.is_equal:
        raise _no_equal(
            f"the exported {JSON_NAME} gives other ids or text for"
            f" {found.num_texts - found.num_equal} of {found.num_texts} texts: {found.difference}"
        )
    logger.info(
        "%s gives the trainer's ids and text for %d of %d texts%s",
        JSON_NAME,
        found.num_equal,
        found.num_texts,
        f"; {found.num_parsed} more spell tokens that it always parses" * bool(found.num_parsed),
    )
    return found


def token_ids(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the tokens that the exported settings name, by role."""
    settings = json.loads(files[SETTINGS_NAME])
    found = {role: _id_of(settings.get(f"{role}_token"), tokenizer) for role in _ROLES}
    return {role: token_id for role, token_id in found.items() if token_id is not None}


def _id_of(token: object, tokenizer: Tokenizer) -> int | None:
    """Return the id of a token as settings write it; None for one that the tokenizer lacks."""
    return tokenizer.token_id(token_text(token) or "")


def _own_roles(model: bytes) -> dict[str, str]:
    """Return the tokens that a SentencePiece model names, by role."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = {"bos": processor.bos_id(), "pad": processor.pad_id()}
    return {role: processor.IdToPiece(each) for role, each in ids.items() if each >= 0}


def _known_tokens(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Leave out special tokens that the tokenizer lacks: transformers would give them new ids."""
    kept = dict(settings)
    for key in sorted(settings):
        text = token_text(settings[key])
        if key.endswith("_token") and text and tokenizer.token_id(text) is None:
            del kept[key]
            logger.warning("export leaves out %s %r, which is no token", key, text)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            kept[key] = [each for each in settings[key] if _id_of(each, tokenizer) is not None]
    return kept


def _no_equal(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer cannot be exported as it is: {reason}; every text must become the ids that"
        " the model was trained on; export without a tokenizer with --no-tokenizer, and encode"
        " texts with this project's"
    )
