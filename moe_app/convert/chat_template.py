"""Gives an export the template that its model was fine-tuned with, and what ends an answer."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files.directory import CONFIG_NAME
from moe_app.chat.jinja_template import TEMPLATE_FILE, RenderingError
from moe_app.chat.prompting import TOKENIZERS_OWN, open_named, saved_template, turn_end
from moe_app.chat.templates import TEMPLATES, jinja_source
from moe_app.convert.exported_tokenizer import GENERATION_NAME, SETTINGS_NAME
from moe_app.convert.files import ExportedFiles

logger = logging.getLogger("convert")

NO_TEMPLATE = "none"
_KEY = "chat_template"


def with_chat_template(
    exported: ExportedFiles, requested: str | None, checkpoint: Path
) -> ExportedFiles:
    """Return the files of an export with a template for conversations.

    One of the project's is written in Jinja as chat_template.jinja, where transformers looks first.
    The tokenizer's own stays as it is. The token that ends an answer joins the `eos_token_id` of
    generation_config.json, at which transformers stops.

    Args:
        exported: The files.
        requested: A template's name, or "none"; None takes what the run was fine-tuned with, and
            leaves other models' files as they are.
        checkpoint: The run's.

    Raises:
        CheckpointError: A template is requested, and the tokenizer is not exported or has none.
        ConfigError: The checkpoint's config is damaged.
    """
    name = requested or saved_template(checkpoint)
    if name is None:
        return exported
    if exported.tokenizer is None or SETTINGS_NAME not in exported.files:
        if requested in (None, NO_TEMPLATE):
            return exported
        raise CheckpointError(
            f"--chat-template {requested} needs a tokenizer, and the export has none that the"
            " trainer can use; name a directory that has it with --like"
        )
    files = dict(exported.files)
    if name != TOKENIZERS_OWN:
        _remove(files)
    if name in TEMPLATES:
        files[TEMPLATE_FILE] = jinja_source(name, exported.tokenizer).encode()
    elif name == TOKENIZERS_OWN and not _has_own(files):
        raise CheckpointError(
            f"--chat-template {name} needs a template beside the tokenizer of {checkpoint}, and"
            f" there is neither {TEMPLATE_FILE} nor a {_KEY} in {SETTINGS_NAME}; name one of"
            f" {', '.join(TEMPLATES)}, or {NO_TEMPLATE}"
        )
    logger.info("template for conversations: %s", name)
    if name != NO_TEMPLATE:
        _stop_at_turn_end(files, name, exported.tokenizer)
    return dataclasses.replace(
        exported, files=files, report={**exported.report, "chat_template": name}
    )


def _remove(files: dict[str, bytes]) -> None:
    """Take the tokenizer's own template away, wherever it is."""
    files.pop(TEMPLATE_FILE, None)
    settings = json.loads(files[SETTINGS_NAME])
    if settings.pop(_KEY, None) is not None:
        files[SETTINGS_NAME] = _dump(settings)


def _has_own(files: Mapping[str, bytes]) -> bool:
    return TEMPLATE_FILE in files or _KEY in json.loads(files[SETTINGS_NAME])


def _stop_at_turn_end(files: dict[str, bytes], name: str, tokenizer: Tokenizer) -> None:
    """Let transformers' generation end where an assistant's turn does."""
    end = _find_end(files, name, tokenizer)
    if end is None:
        return
    generation: dict[str, Any] = json.loads(files.get(GENERATION_NAME, b"{}"))
    model = json.loads(files[CONFIG_NAME])
    stated = generation.get("eos_token_id", model.get("eos_token_id"))
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if end in known:
        return
    generation["eos_token_id"] = [*known, end] if known else end
    files[GENERATION_NAME] = _dump(generation)
    logger.info(
        "export adds %r (id %d), which ends an answer, to eos_token_id of %s",
        *(tokenizer.token_text(end), end, GENERATION_NAME),
    )


def _find_end(files: Mapping[str, bytes], name: str, tokenizer: Tokenizer) -> int | None:
    if name in TEMPLATES:
        return tokenizer.eod
    with tempfile.TemporaryDirectory() as folder:
        for each in (TEMPLATE_FILE, SETTINGS_NAME):
            if each in files:
                (Path(folder) / each).write_bytes(files[each])
        try:
            with contextlib.closing(open_named(name, Path(folder), tokenizer)) as template:
                return turn_end(template, tokenizer)
        except RenderingError as error:
            logger.warning("which token ends an answer is not known: %s", error)
            return None


def _dump(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()
