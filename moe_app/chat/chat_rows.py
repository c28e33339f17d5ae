"""Reads what one row of conversation data holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.trainer.errors import DataError
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.dialogue import ASSISTANT, ChatKind, Dialogue, Turn, Turns

MOST_ROW_BYTES = 1 << 24
"""Of one row; more is no conversation."""
USER = "user"

_SHOWN_KEYS = 20

ChatRow = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Holds what one row adds to the data."""

    dialogues: tuple[Dialogue, ...]
    """A conversation; a better and a worse one; or a judged one."""
    label: bool | None = None
    """The judgement, if it has one."""


def read_unit(row: ChatRow, kind: ChatKind, cfg: ChatDataConfig) -> Unit:
    """Return what a row holds.

    Raises:
        DataError: It holds nothing that can be trained on; the message does not say where it is.
    """
    unit = _READERS[kind](row, cfg)
    size = sum(len(turn.content) for each in unit.dialogues for turn in each.turns)
    if size > MOST_ROW_BYTES:
        raise DataError(
            f"has {size:,} characters; a row must have at most {MOST_ROW_BYTES:,}; split it"
        )
    for each in unit.dialogues:
        is_needed = kind != "sft" or cfg.train_on != "all"
        if is_needed and not any(t.role == ASSISTANT for t in each.turns[each.first_counted :]):
            raise DataError(
                "has no turn of an assistant to learn from; add one, or remove the row"
                + ("; --train-on all learns from every turn" if kind == "sft" else "")
            )
    return unit


def _read_conversation(row: ChatRow, cfg: ChatDataConfig) -> Unit:
    turns = _turns(row, cfg.messages_key, cfg, flag="--messages-key")
    return Unit(dialogues=(Dialogue(turns=turns),))


def _read_preference(row: ChatRow, cfg: ChatDataConfig) -> Unit:
    """Return the better and the worse conversation; their common beginning is the prompt."""
    chosen = _answered(row, cfg.chosen_key, cfg, flag="--chosen-key")
    rejected = _answered(row, cfg.rejected_key, cfg, flag="--rejected-key")
    if chosen == rejected:
        raise DataError(
            f"{cfg.chosen_key!r} and {cfg.rejected_key!r} are equal; a pair must differ; remove it"
        )
    common = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        common += 1
    return Unit(
        dialogues=tuple(Dialogue(turns=turns, first_counted=common) for turns in (chosen, rejected))
    )


def _read_judged(row: ChatRow, cfg: ChatDataConfig) -> Unit:
    label = _value(row, cfg.label_key, flag="--label-key")
    if not isinstance(label, bool):
        raise DataError(
            f"{cfg.label_key!r} is {label!r:.40}; it must be true or false; repair or remove the"
            " row"
        )
    key = cfg.messages_key if cfg.prompt_key not in row else cfg.prompt_key
    prompt = _prompt(row, key, cfg, flag="--prompt-key")
    answer = _answer(row, cfg.completion_key, cfg, flag="--completion-key")
    dialogue = Dialogue(turns=prompt + answer, first_counted=len(prompt))
    return Unit(dialogues=(dialogue,), label=label)


_READERS: dict[ChatKind, Callable[[ChatRow, ChatDataConfig], Unit]] = {
    "sft": _read_conversation,
    "preference": _read_preference,
    "kto": _read_judged,
}


def _answered(row: ChatRow, key: str, cfg: ChatDataConfig, *, flag: str) -> Turns:
    """Return a conversation that ends with an answer.

    A list of turns that does not begin with an assistant's is a whole one; otherwise the prompt
    comes first.
    """
    answer = _answer(row, key, cfg, flag=flag)
    if answer[0].role != ASSISTANT:
        return answer
    return _prompt(row, cfg.prompt_key, cfg, flag="--prompt-key") + answer


def _answer(row: ChatRow, key: str, cfg: ChatDataConfig, *, flag: str) -> Turns:
    if isinstance(value := _value(row, key, flag=flag), str):
        return (Turn(ASSISTANT, _checked(value, repr(key))),)
    return _turns(row, key, cfg, flag=flag)


def _prompt(row: ChatRow, key: str, cfg: ChatDataConfig, *, flag: str) -> Turns:
    if isinstance(value := _value(row, key, flag=flag), str):
        return (Turn(USER, _checked(value, repr(key))),)
    return _turns(row, key, cfg, flag=flag)


def _turns(row: ChatRow, key: str, cfg: ChatDataConfig, *, flag: str) -> Turns:
    value = _value(row, key, flag=flag)
    if not isinstance(value, list):
        raise DataError(
            f"{key!r} is {_kind_of(value)}; it must be a list of turns; name another key with"
            f" {flag}, or repair the row"
        )
    if not value:
        raise DataError(f"{key!r} has no turns; it must have at least one; remove the row")
    return tuple(_turn(each, f"turn {n} of {key!r}", cfg) for n, each in enumerate(value, 1))


def _turn(value: object, where: str, cfg: ChatDataConfig) -> Turn:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is {_kind_of(value)}; it must be an object with {cfg.role_key!r} and"
            f" {cfg.content_key!r}; repair or remove the row"
        )
    texts = []
    for key, flag in ((cfg.role_key, "--role-key"), (cfg.content_key, "--content-key")):
        text = _value(value, key, flag=flag, where=where)
        if not isinstance(text, str):
            raise DataError(
                f"{key!r} of {where} is {_kind_of(text)}; it must be a text; repair or remove the"
                " row"
            )
        texts.append(_checked(text, f"{key!r} of {where}"))
    return Turn(*texts)


def _value(row: ChatRow, key: str, *, flag: str, where: str = "the row") -> object:
    if key not in row:
        raise DataError(
            f"{where} has no {key!r}, only {sorted(map(str, row))[:_SHOWN_KEYS]}; name the right"
            f" key with {flag}, or repair the row"
        )
    return row[key]


def _checked(text: str, where: str) -> str:
    """Return a text that can be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has a lone surrogate at character {error.start}; text must be valid Unicode;"
            " repair or remove the row"
        ) from error
    return text


def _kind_of(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
