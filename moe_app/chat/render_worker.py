"""Renders conversations with a tokenizer's own template, in a process that may be killed.

A template is a program of unknown origin. transformers' sandbox keeps it from Python's objects, but
not from loops without end or texts without bounds; this process sets itself limits, and reads JSON
from standard input and writes JSON to standard output alone.
"""

import contextlib
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

MOST_REPLY_CHARACTERS = 1 << 26
"""Of all texts that one conversation is rendered to."""

_MOST_MEMORY = 4 << 30
_FIXED_DATE = (2024, 7, 26)
_LENGTH = struct.Struct("<Q")

Message = dict[str, Any]
"""What passes between the processes, as JSON."""


def write_message(file: BinaryIO, message: Message) -> None:
    """Write a message, preceded by its length."""
    content = json.dumps(message).encode("ascii")
    file.write(_LENGTH.pack(len(content)) + content)
    file.flush()


def read_message(file: BinaryIO, most_bytes: int = 1 << 40) -> Message | None:
    """Return the next message; None at the end.

    Raises:
        ValueError: It is no JSON object, or too long.
    """
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > most_bytes:
        raise ValueError(f"a message of {length:,} bytes, at most {most_bytes:,}")
    content = file.read(length)
    if len(content) < length:
        return None
    message = json.loads(content)
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def serve() -> None:
    """Answer requests until there are no more. The first one says what is rendered."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    first = read_message(requests)
    if first is None:
        return
    seconds = float(first["seconds"])
    try:
        _rehearse()
        # Translating a template computes what is constant in it: it has the limits, too.
        _limit_self()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        render = make_rendering(first["template"], first["variables"])
        signal.setitimer(signal.ITIMER_PROF, 0)
    except Exception as error:
        write_message(replies, {"error": _described(error)})
        return
    write_message(replies, {})
    while (request := read_message(requests)) is not None:
        # The system itself ends the process when the time is over, whatever it is at.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = answer(render, request)
        except Exception as error:
            reply = {"error": _described(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(replies, reply)


Rendering = Callable[[list[Message], bool, bool], tuple[str, list[list[int]]]]
"""Messages, with a beginning for the assistant or not, with marks or not: text and spans."""


def make_rendering(template: str, variables: dict[str, str]) -> Rendering:
    """Return what renders with a template; it is translated once.

    Raises:
        Exception: transformers is not installed, or the template is no Jinja.
    """
    from datetime import datetime

    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    # Data must not depend on the day on which they are made.
    date = datetime(*_FIXED_DATE)
    others: dict[str, Any] = dict(variables)
    _compile_jinja_template(template).environment.globals["strftime_now"] = date.strftime

    def render(
        messages: list[Message], has_prompt: bool, has_marks: bool
    ) -> tuple[str, list[list[int]]]:
        # Its declared types are narrower than what it takes and gives.
        found: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=has_marks,
            add_generation_prompt=has_prompt,
            **others,
        )
        texts, spans = found
        return texts[0], [list(span) for span in spans[0]] if has_marks else []

    return render


def answer(render: Rendering, request: Message) -> Message:
    """Return the texts that a request asks for.

    Raises:
        ValueError: They are too long.
    """
    messages = request["messages"]
    text, spans = render(messages, False, request["marks"])
    length = len(text)
    cuts: list[str | None] = []
    for count, has_prompt in request["cuts"]:
        try:
            cuts.append(render(messages[:count], has_prompt, False)[0])
        except MemoryError:
            raise
        except Exception:  # as of templates that refuse a part of a conversation
            cuts.append(None)
        length += len(cuts[-1] or "")
        if length > MOST_REPLY_CHARACTERS:
            break
    if length > MOST_REPLY_CHARACTERS:
        raise ValueError(f"it makes more than {MOST_REPLY_CHARACTERS:,} characters")
    return {"text": text, "spans": spans, "cuts": cuts}


def _rehearse() -> None:
    """Let the libraries load what they load late: no file can be opened afterwards.

    Raises:
        Exception: transformers is not installed.
    """
    from jinja2.exceptions import TemplateError

    for template in ("{{ raise_exception(messages[0]['content']) }}", "{% for %}"):
        with contextlib.suppress(TemplateError):
            make_rendering(template, {})([{"role": "user", "content": ""}], False, False)


def _limit_self() -> None:
    """Take memory, files and other processes' rights away from whatever comes next."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
