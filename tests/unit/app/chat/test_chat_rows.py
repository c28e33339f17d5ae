"""Tests what rows of conversation data hold, and what is wrong with bad ones."""

from typing import Any

import pytest

from megatron.trainer.errors import ConfigError, DataError
from moe_app.chat import chat_rows
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_rows import Unit, read_unit
from moe_app.chat.dialogue import ChatKind, Dialogue, Turn

USER, BAD, GOOD = Turn("user", "q"), Turn("assistant", "no"), Turn("assistant", "yes")


def message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def read(row: dict[str, Any], kind: ChatKind, **settings: Any) -> Unit:
    return read_unit(row, kind, ChatDataConfig(**settings))


PAIR = Unit(
    dialogues=(
        Dialogue(turns=(USER, GOOD), first_counted=1),
        Dialogue(turns=(USER, BAD), first_counted=1),
    )
)
WHOLE = {"chosen": [message(USER), message(GOOD)], "rejected": [message(USER), message(BAD)]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [message(USER)], "chosen": [message(GOOD)], "rejected": [message(BAD)]},
        {"prompt": "q", "chosen": [message(GOOD)], "rejected": "no"},
        WHOLE,
        {"prompt": "not looked at", **WHOLE},
    ],
)
def test_forms_of_a_pair_mean_the_same(row: dict[str, Any]) -> None:
    assert read(row, "preference") == PAIR


def test_common_turns_of_a_pair_are_its_prompt() -> None:
    start = [message(USER), message(GOOD), message(USER)]
    row = {"chosen": [*start, message(GOOD)], "rejected": [*start, message(BAD)]}
    assert [each.first_counted for each in read(row, "preference").dialogues] == [3, 3]


@pytest.mark.parametrize(
    "prompt", [{"prompt": "q"}, {"prompt": [message(USER)]}, {"messages": [message(USER)]}]
)
@pytest.mark.parametrize("completion", ["yes", [message(GOOD)]])
def test_forms_of_a_judged_answer_mean_the_same(prompt: dict[str, Any], completion: object) -> None:
    unit = read({**prompt, "completion": completion, "label": True}, "kto")
    assert unit == Unit(dialogues=PAIR.dialogues[:1], label=True)


def test_keys_are_those_of_the_flags() -> None:
    row = {"conversation": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "yes"}]}
    names = {"messages_key": "conversation", "role_key": "from", "content_key": "value"}
    assert read(row, "sft", **names).dialogues[0].turns == (USER, GOOD)


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("sft", {"text": "x"}, r"no 'messages', only \['text'\].*--messages-key"),
        ("sft", {"messages": "x"}, "'messages' is a str; it must be a list"),
        ("sft", {"messages": []}, "'messages' has no turns"),
        ("sft", {"messages": ["x"]}, "turn 1 of 'messages' is a str"),
        ("sft", {"messages": [{"role": "user"}]}, "turn 1 of 'messages' has no 'content'"),
        (
            "sft",
            {"messages": [{"role": "user", "content": None}]},
            "'content' of turn 1 of 'messages' is null; it must be a text",
        ),
        ("sft", {"messages": [{"role": 1, "content": ""}]}, "'role' of turn 1 .* is a int"),
        (
            "sft",
            {"messages": [{"role": "assistant", "content": "\ud800"}]},
            "lone surrogate at character 0",
        ),
        ("sft", {"messages": [message(USER)]}, "no turn of an assistant to learn from"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ("preference", {"prompt": "q", "chosen": "a"}, "no 'rejected'.*--rejected-key"),
        (
            "preference",
            {"chosen": [message(USER)], "rejected": [message(USER), message(BAD)]},
            "no turn of an assistant",
        ),
        ("kto", {"prompt": "q", "completion": "a"}, "no 'label'.*--label-key"),
        ("kto", {"prompt": "q", "completion": "a", "label": 1}, "'label' is 1; it must be true"),
        ("kto", {"prompt": "q", "completion": [message(USER)], "label": True}, "no turn of an"),
    ],
)
def test_bad_row_says_what_is_wrong(kind: ChatKind, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read(row, kind)


def test_training_on_everything_needs_no_assistant() -> None:
    row = {"messages": [message(USER)]}
    assert read(row, "sft", train_on="all").dialogues[0].turns == (USER,)
    with pytest.raises(ConfigError, match="--train-on is all"):
        ChatDataConfig(train_on="all").check("kto")


def test_row_without_bounds_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rows, "MOST_ROW_BYTES", 3)
    with pytest.raises(DataError, match="has 4 characters; a row must have at most 3"):
        read({"messages": [message(USER), message(GOOD)]}, "sft")
