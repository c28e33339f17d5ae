"""Says what an export changes of the Hugging Face checkpoint that its model was imported from."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from megatron.trainer.data.tokenizer_files import JSON_FILES

logger = logging.getLogger("convert")

_ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Fields that are compared even where the import does not have them."""
_WRITER = ("transformers_version", "_name_or_path")


def log_changes(
    known: Mapping[str, Any],
    config: Mapping[str, Any],
    before: Mapping[str, bytes],
    after: Mapping[str, bytes],
) -> list[str]:
    """Return and log what differs from an import, a line each.

    Args:
        known: its config.json.
        config: the exported one.
        before: its tokenizer and generation files, by name.
        after: the exported ones.
    """
    changes = [
        f"{key}: {_shown(known, key)} -> {_shown(config, key)}"
        for key in config
        if (key in known or key in _ALWAYS) and key not in _WRITER and known.get(key) != config[key]
    ]
    for name in sorted(before.keys() | after.keys()):
        changes += _file_changes(name, before.get(name), after.get(name))
    for change in changes:
        logger.info("export changes %s", change)
    return changes


def _file_changes(name: str, before: bytes | None, after: bytes | None) -> list[str]:
    if before == after:
        return []
    if before is None or after is None:
        return [f"{name}: " + ("not there -> made" if before is None else "there -> left out")]
    if name not in JSON_FILES:
        return [f"{name}: the import's -> another"]
    old, new = json.loads(before), json.loads(after)
    return [
        f"{key} of {name}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if settings.get(key) is not None else "not set"
