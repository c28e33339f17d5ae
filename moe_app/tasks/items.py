"""Reads questions with given answers from JSON Lines files, a task a file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.data.jsonl import TextLines, parse_object, valid_text
from megatron.trainer.errors import ConfigError, DataError
from moe_app.tasks import olmes_requests

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)")


@dataclass(frozen=True, kw_only=True)
class TaskItem:
    """Holds a question: a context, and the texts that may follow it."""

    where: str
    """File and line, for messages."""
    context: str
    """May be empty."""
    choices: tuple[str, ...]
    """As they are written, two or more; by their lengths scores are normalised."""
    gold: int
    """The right one among the choices."""
    bare_context: str | None = None
    """What stands before the choices when the question is left out; None for no such score."""
    contexts: tuple[str, ...] | None = None
    """What stands before each choice, in the place of `context`; None where that is the same."""

    def context_of(self, index: int) -> str:
        """Return what stands before a choice."""
        return self.context if self.contexts is None else self.contexts[index]

    def continuation(self, choice: str, context: str | None = None) -> str:
        """Return what follows a context, by default the item's.

        It is the choice, after a space if nothing else divides them.
        """
        before = self.context if context is None else context
        is_divided = choice[:1].isspace() or before[-1:].isspace()
        return choice if is_divided or not before else f" {choice}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Holds the items of one file."""

    name: str
    """In records and plots."""
    items: tuple[TaskItem, ...]


def read_tasks(given: Sequence[str], *, limit: int | None) -> list[Task]:
    """Read the tasks that files and directories hold, in the order given.

    Args:
        given: files, directories of files, or NAME=FILE; without a name a task has the file's.
        limit: the most items of a task, its first ones; None takes all.

    Raises:
        ConfigError: nothing is there, or two tasks have one name.
        DataError: a file cannot be read, or a line is no item.
    """
    files: dict[str, Path] = {}
    for name, path in (pair for each in given for pair in _files(each)):
        if name in files:
            raise ConfigError(
                f"--eval-tasks names two tasks {name!r}: {files[name]} and {path}; a name is a key"
                f" of the records; call one otherwise: OTHER={path}"
            )
        files[name] = path
    return [Task(name=name, items=tuple(_read_items(path, limit))) for name, path in files.items()]


def _files(given: str) -> list[tuple[str, Path]]:
    """Return the names and files of one argument."""
    named = _NAMED.fullmatch(given)
    if named is not None and not Path(given).exists():
        return [(named[1], Path(named[2]))]
    path = Path(given)
    if not path.is_dir():
        return [(_name(path), path)]
    found = sorted(each for each in path.iterdir() if each.name.endswith(_ENDINGS))
    if not found:
        raise ConfigError(
            f"--eval-tasks {given} is a directory without {' or '.join(_ENDINGS)}; each such file"
            " is a task; name the files, or the directory that has them"
        )
    return [(_name(each), each) for each in found]


def _name(path: Path) -> str:
    """Return the file's name without its ending."""
    ending = next((each for each in _ENDINGS if path.name.endswith(each)), path.suffix)
    return path.name.removesuffix(ending) or path.name


def _read_items(path: Path, limit: int | None) -> list[TaskItem]:
    """Read the items of a file; all lines are checked, those beyond the limit too."""
    if _holds_requests(path):
        return [_requested(each, path) for each in olmes_requests.read_items(path)][:limit]
    items = []
    for number, line in TextLines(str(path)):
        where = f"{path}, line {number}"
        items.append(_item(parse_object(line, path=str(path), number=number), where))
    if not items:
        raise DataError(f"{path} has no items; a task needs one or more, one JSON object a line")
    return items[:limit]


def _holds_requests(path: Path) -> bool:
    """Return whether the first line is a request of OLMES, and not an item."""
    if not path.name.endswith(".gz"):
        return False
    lines = ((number, line) for number, line in TextLines(str(path)))
    number, line = next(lines, (0, None))
    return line is not None and "request" in parse_object(line, path=str(path), number=number)


def _requested(item: olmes_requests.Item, path: Path) -> TaskItem:
    """Return an item of OLMES: its choices are written with the space before them."""
    contexts = tuple(choice.context for choice in item.choices)
    bare = {choice.unconditional for choice in item.choices}
    return TaskItem(
        where=f"{path}, item {item.doc_id}",
        context=contexts[0],
        contexts=contexts if len(set(contexts)) > 1 else None,
        choices=tuple(choice.continuation for choice in item.choices),
        gold=item.gold,
        bare_context=bare.pop() if len(bare) == 1 else None,
    )


def _item(value: dict[str, Any], where: str) -> TaskItem:
    """Return the item that a line's object describes.

    Raises:
        DataError: it describes none.
    """
    lacking = [key for key in ("context", "choices") if key not in value]
    if lacking or not value.keys() & {"label", "answer"}:
        raise DataError(
            f"{where}: has the keys {sorted(value)[:20]}; an item has context, choices, and label"
            " or answer; see docs/evaluation.md, and repair the line"
        )
    choices = _choices(value["choices"], where)
    bare = None
    if value.get("bare_context") is not None:
        bare = valid_text(value, "bare_context", where=where)
    return TaskItem(
        where=where,
        context=valid_text(value, "context", where=where),
        choices=choices,
        gold=_gold(value, choices, where),
        bare_context=bare,
    )


def _choices(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or len(given) < 2:
        raise DataError(
            f"{where}: 'choices' must be a list of two texts or more, the right one among them;"
            " repair or remove the line"
        )
    texts = tuple(
        valid_text({f"choice {number}": each}, f"choice {number}", where=where)
        for number, each in enumerate(given)
    )
    if not all(texts):
        raise DataError(
            f"{where}: choice {texts.index('')} is empty, and no text has no probability; repair or"
            " remove the line"
        )
    return texts


def _gold(value: dict[str, Any], choices: tuple[str, ...], where: str) -> int:
    """Return the index of the right choice, which is given as that or as the choice's text."""
    if "label" in value and "answer" in value:
        raise DataError(
            f"{where}: has both 'label' and 'answer'; one says which choice is right; drop one"
        )
    key = "label" if "label" in value else "answer"
    given = value[key]
    if isinstance(given, str) and choices.count(given) == 1:
        return choices.index(given)
    if type(given) is int and 0 <= given < len(choices):
        return given
    raise DataError(
        f"{where}: {key!r} is {given!r}; it must be the number of the right choice, 0 to"
        f" {len(choices) - 1}, or the text of exactly one choice; repair or remove the line"
    )
