"""Makes prompts of conversations, for a model that was taught to answer them."""

import argparse
import logging
from pathlib import Path
from typing import Any

from megatron.trainer.data.jsonl import valid_text
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat.dialogue import ChatTemplate, Turn, Turns
from moe_app.chat.prompting import (
    TEMPLATE_NAMES,
    TOKENIZERS_OWN,
    open_named,
    prompt_ids,
    saved_template,
    turn_end,
)

logger = logging.getLogger("generate")

MESSAGES_KEY = "messages"
"""Key of a conversation in a line of `--input`."""
_USER = "user"
_TURN_KEYS = ("role", "content")


def add_template_flag(group: "argparse._ArgumentGroup") -> None:
    """Add the flag for how conversations are written."""
    group.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        help="take each prompt for what a user says, and write it with this template, which"
        " announces an answer; without it prompts are plain text, and conversations are written as"
        " the model was fine-tuned with, or else as the tokenizer's own template does",
    )


class Conversations:
    """Encodes conversations up to where the model's answer begins; on rank 0 only.

    Args:
        name: of the template, a name in TEMPLATE_NAMES; None takes the one that the checkpoint's
            run was fine-tuned with, or else the tokenizer's.
        tokenizer: of the model.
        checkpoint: of the run.
        tokenizer_path: where the tokenizer is, if not in the checkpoint.
    """

    def __init__(
        self,
        name: str | None,
        tokenizer: Tokenizer,
        *,
        checkpoint: Path,
        tokenizer_path: str | None,
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._checkpoint = checkpoint
        path = checkpoint if tokenizer_path is None else Path(tokenizer_path)
        self._directory = path if path.is_dir() else path.parent
        self._template: ChatTemplate | None = None

    def encode_user(self, text: str) -> list[int]:
        """Return the tokens of a conversation in which a user has said `text`.

        Raises:
            UserError: there is no such template, or it does not take the text.
        """
        return self.encode_turns((Turn(_USER, text),))

    def encode_turns(self, turns: Turns) -> list[int]:
        """Return the tokens of a conversation.

        Raises:
            UserError: there is no such template, or it does not take the turns.
        """
        return prompt_ids(self._opened(), self._tokenizer, turns)

    def write_turns(self, turns: Turns) -> str:
        """Return the text of a conversation, in which control tokens are spelled.

        Raises:
            UserError: there is no such template, or it does not take the turns.
        """
        return self._opened().announce(turns).text

    def encode_messages(self, record: dict[str, Any], where: str) -> list[int]:
        """Return the tokens of the conversation in a line of the input.

        Raises:
            UserError: it is none, there is no such template, or it does not take the turns.
        """
        turns = _read_turns(record[MESSAGES_KEY], where)
        try:
            return self.encode_turns(turns)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def find_end(self) -> int | None:
        """Return the token that ends an answer; None where none does, or nothing was encoded."""
        return None if self._template is None else turn_end(self._template, self._tokenizer)

    def close(self) -> None:
        """End what renders."""
        if self._template is not None:
            self._template.close()

    def _opened(self) -> ChatTemplate:
        if self._template is None:
            name = self._name or saved_template(self._checkpoint) or TOKENIZERS_OWN
            self._template = open_named(name, self._directory, self._tokenizer)
            logger.info("conversations are written with the template %s", name)
        return self._template


def _read_turns(value: object, where: str) -> Turns:
    if not isinstance(value, list) or not value:
        raise _no_conversation(where, "no list of turns, or an empty one")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not turn.keys() >= set(_TURN_KEYS):
            raise _no_conversation(where, f"no role and content in turn {number}")
    return tuple(
        Turn(*(valid_text(turn, key, where=f"{where}, turn {number}") for key in _TURN_KEYS))
        for number, turn in enumerate(value, start=1)
    )


def _no_conversation(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: {MESSAGES_KEY!r} has {what}; it must be a list of at least one"
        ' {"role": TEXT, "content": TEXT}; repair or remove the line'
    )
