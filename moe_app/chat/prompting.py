"""Writes conversations for a model to answer, and finds out how a model was taught to."""

import logging
from pathlib import Path

from megatron.trainer.checkpoint.load import read_text
from megatron.trainer.config.recipe import plain_values
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.chat.dialogue import ASSISTANT, ChatTemplate, Turn, Turns
from moe_app.chat.jinja_template import RenderingError, TokenizerTemplate
from moe_app.chat.templates import TEMPLATES, BuiltinTemplate

logger = logging.getLogger(__name__)

TOKENIZERS_OWN = "tokenizer"
TEMPLATE_NAMES = (*TEMPLATES, TOKENIZERS_OWN)
"""What --template may be."""

_SHORT_CHAT = (Turn("user", "a"), Turn(ASSISTANT, "b"))


def saved_template(checkpoint: Path) -> str | None:
    """Return the template that a run was fine-tuned or aligned with; None for another run.

    Raises:
        ConfigError: The config in the checkpoint cannot be read, or names no template.
    """
    path = checkpoint / CONFIG_NAME
    try:
        saved = plain_values(read_text(checkpoint, CONFIG_NAME))
    except ValueError as error:
        raise ConfigError(f"{path} is no config: {error}; restore it") from error
    name = saved.get("template") if isinstance(saved, dict) else None
    if name is None or name in TEMPLATE_NAMES:
        return name
    raise ConfigError(
        f"{path} has the template {name!r:.80}; it must be one of {', '.join(TEMPLATE_NAMES)};"
        " restore it"
    )


def open_named(name: str, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a template by its name; close it after use.

    Args:
        name: One of `TEMPLATE_NAMES`.
        directory: Has the tokenizer's own.
        tokenizer: Has the control tokens.

    Raises:
        DataError: The tokenizer has none of its own.
    """
    if name in TEMPLATES:
        return BuiltinTemplate(name, tokenizer)
    return TokenizerTemplate(directory, tokenizer)


def prompt_ids(template: ChatTemplate, tokenizer: Tokenizer, turns: Turns) -> list[int]:
    """Return the tokens after which an assistant's answer begins.

    Raises:
        DataError: The template does not take the turns.
    """
    rendered = template.announce(turns)
    return tokenizer.encode_written(rendered.text, rendered.as_text).ids


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """Return the control token that ends what an assistant writes; None where none does.

    Raises:
        RenderingError: Nothing can be rendered with the template.
    """
    try:
        rendered = template.render(_SHORT_CHAT)
    except RenderingError:
        raise
    except DataError as error:
        logger.warning("which token ends an answer is not known: %s", error)
        return None
    control = set(tokenizer.control_texts())
    encoding = tokenizer.encode_written(rendered.text, rendered.as_text)
    for first, last in (each.span for each in rendered.targets):
        within = [
            token_id
            for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if first <= begin < end <= last
        ]
        if within and tokenizer.token_text(within[-1]) in control:
            return within[-1]
    return None
