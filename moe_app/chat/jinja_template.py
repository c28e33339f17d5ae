"""Renders conversations with the template that belongs to a tokenizer, and finds its borders.

What the assistant wrote is known by the template's `{% generation %}` marks. Where it has none, the
conversation is rendered up to each border: each of these texts must be how the whole one begins.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from megatron.trainer.data.encoding import Span, find_spelled, overlaps
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.tokenizer_files import (
    TokenizerSettings,
    read_beside,
    read_settings,
    token_text,
)
from megatron.trainer.errors import DataError
from moe_app.chat.dialogue import ASSISTANT, Rendered, Target, Turn, Turns
from moe_app.chat.render_worker import Message, read_message, write_message
from moe_app.chat.templates import control_pattern

SECONDS = 10.0
"""Processor time that one conversation may take."""
TEMPLATE_FILE = "chat_template.jinja"

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from moe_app.chat.render_worker import serve; serve()"
)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST_REPLY_BYTES = 1 << 30
_FIRST_PRIVATE, _LAST_PRIVATE = 0xE000, 0xF8FF


class TokenizerTemplate:
    """Renders with the template beside a tokenizer.

    Args:
        directory: Holds the tokenizer's files.
        tokenizer: Has the control tokens, which turns may only spell.
        start: Starts what renders.

    Raises:
        DataError: There is no template, or it cannot be used.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, start: "Start | None" = None
    ) -> None:
        settings = read_settings(directory)
        self._source = _read_source(directory, settings)
        self._directory = directory
        self._variables = _variables(settings, tokenizer)
        self._control = tokenizer.control_texts()
        self._spelled = control_pattern(tokenizer)
        self._has_marks = _MARK.search(self._source) is not None
        self._start: Start = RenderProcess if start is None else start
        self._renderer: Renderer | None = None
        self.identity: str = json.dumps([self._source, self._variables])

    def render(self, turns: Turns, *, has_targets: bool = True) -> Rendered:
        """Return the text of a conversation.

        Raises:
            DataError: The template refuses it, takes too long, or does not say where what the
                assistant wrote begins and ends.
        """
        assistant = [number for number, turn in enumerate(turns) if turn.role == ASSISTANT]
        needs_cuts = has_targets and not self._has_marks
        reply = self._ask(turns, _cuts(turns, assistant) if needs_cuts else [])
        text: str = reply["text"]
        as_text = self._find_spelled(turns, text, self._whole)
        marked = [(int(first), int(last)) for first, last in reply["spans"]]
        pairs: list[tuple[int, Span]] = []
        if needs_cuts:
            borders = self._borders(turns, assistant, reply)
            spans = [self._without_space(text, border, as_text) for border in borders]
            pairs = list(zip(assistant, spans, strict=True))
        elif has_targets and len(marked) == len(assistant) <= 1:
            pairs = list(zip(assistant, marked, strict=True))
        elif has_targets:
            pairs = self._owners(turns, assistant, marked)
        targets = tuple(Target(turn=turn, span=span) for turn, span in pairs)
        return Rendered(text=text, targets=targets, as_text=as_text)

    def announce(self, turns: Turns) -> Rendered:
        """Return the text of a conversation up to where an assistant's next turn begins.

        Raises:
            DataError: The template refuses it, or takes too long.
        """
        text = self._announced(turns)
        return Rendered(
            text=text, targets=(), as_text=self._find_spelled(turns, text, self._announced)
        )

    def _announced(self, turns: Turns) -> str:
        (text,) = self._ask(turns, [(len(turns), True)])["cuts"]
        if text is None:
            raise DataError(
                f"the template of {self._directory} fails where it is to begin an assistant's turn"
                " (add_generation_prompt); correct it, or use another --template"
            )
        return str(text)

    def _whole(self, turns: Turns) -> str:
        return str(self._ask(turns, [])["text"])

    def close(self) -> None:
        """End the process that renders."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _check_roles(self, turns: Turns) -> None:
        """Refuse roles that a template would write as control tokens.

        Raises:
            DataError: One spells such a token.
        """
        for number, turn in enumerate(turns, 1):
            if self._spelled.search(turn.role):
                raise DataError(
                    f"turn {number} has the role {turn.role!r:.80}, which spells a control token of"
                    " the tokenizer; only the template may place one; rename the role, or remove"
                    " the row"
                )

    def _owners(
        self, turns: Turns, assistant: Sequence[int], marked: Sequence[Span]
    ) -> list[tuple[int, Span]]:
        """Return which turn each mark is of: a turn may have several, or none.

        Raises:
            DataError: Borders do not tell, and there are not as many marks as turns.
        """
        reply = self._ask(turns, _cuts(turns, assistant))
        try:
            borders = self._borders(turns, assistant, reply)
        except DataError:
            if len(marked) != len(assistant):
                raise
            return list(zip(assistant, marked, strict=True))
        whose = zip(assistant, borders, strict=True)
        return [(turn, span) for turn, own in whose for span in marked if overlaps(span, [own])]

    def _borders(self, turns: Turns, assistant: Sequence[int], reply: Message) -> list[Span]:
        """Return what lies between the text before each turn of an assistant and that with it."""
        text, cuts = reply["text"], iter(reply["cuts"])
        borders = []
        for number in assistant:
            before = next(cuts)
            through = next(cuts) if number + 1 < len(turns) else text
            is_known = (
                before is not None
                and through is not None
                and through.startswith(before)
                and text.startswith(through)
            )
            if not is_known:
                raise DataError(
                    f"the template of {self._directory} does not say where turn {number + 1}, an"
                    " assistant's, begins and ends: what it makes of the conversation up to there"
                    " is not how the whole begins; put {% generation %} and {% endgeneration %}"
                    " around what the assistant writes, use --train-on all or another --template"
                )
            borders.append((len(before), len(through)))
        return borders

    def _without_space(self, text: str, span: Span, as_text: Sequence[Span]) -> Span:
        """Return a span without white space after the control token that ends it, if one does."""
        first, last = span
        ends = [
            first + stop
            for _, (start, stop) in find_spelled(text[first:last], self._control)
            if not overlaps((first + start, first + stop), as_text)
        ]
        if ends and not text[ends[-1] : last].strip():
            return first, ends[-1]
        return span

    def _find_spelled(
        self, turns: Turns, text: str, render: Callable[[Turns], str]
    ) -> tuple[Span, ...]:
        """Return where the text that `render` made of turns has control tokens that one spells.

        They are marked, by characters that the conversation does not have, and rendered again.

        Raises:
            DataError: The template makes another text of marked turns.
        """
        if not any(self._spelled.search(turn.content) for turn in turns):
            return ()
        begin, end = _unused(text + "".join(turn.content for turn in turns))
        marked = tuple(
            Turn(turn.role, self._spelled.sub(rf"{begin}\g<0>{end}", turn.content))
            for turn in turns
        )
        pieces = re.split(f"([{begin}{end}])", render(marked))
        spans, at, opened = [], 0, None
        for piece in pieces:
            if piece == begin:
                opened = at
            elif piece == end and opened is not None:
                spans.append((opened, at))
                opened = None
            elif piece != end:
                at += len(piece)
        if "".join(pieces[::2]) != text or opened is not None:
            raise DataError(
                "a turn spells a control token of the tokenizer, and the template of"
                f" {self._directory} makes something else of it; take the token out of the turn"
            )
        return tuple(spans)

    def _ask(self, turns: Turns, cuts: Sequence[tuple[int, bool]]) -> Message:
        """Return the texts that the template makes of a conversation and of its beginnings.

        Raises:
            DataError: It fails on the conversation.
        """
        self._check_roles(turns)
        if self._renderer is None:
            self._renderer = self._start(self._source, self._variables, str(self._directory))
        return self._renderer.ask(
            {
                "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
                "marks": self._has_marks,
                "cuts": list(cuts),
            }
        )


class RenderingError(DataError):
    """Reports that no conversation can be rendered, not only one."""


class Renderer(Protocol):
    """Declares what renders with one template."""

    def ask(self, request: Message) -> Message:
        """Return the texts that a request asks for.

        Raises:
            DataError: The template does not take the conversation.
        """

    def close(self) -> None:
        """Give back what it holds."""


Start = Callable[[str, Mapping[str, str], str], Renderer]
"""From a template, the special tokens by name, and the directory's name for messages."""


class RenderProcess:
    """Renders in another process.

    Raises:
        RenderingError: The template is no Jinja, or transformers is not installed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], name: str) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        first = {"template": source, "variables": dict(variables), "seconds": SECONDS}
        try:
            self.ask(first)
        except DataError as error:
            self.close()
            raise RenderingError(
                f"{error}; --template tokenizer needs a Jinja template that transformers can"
                " render, and transformers itself (pip install 'megatron-moe[hf]')"
            ) from error

    def ask(self, request: Message) -> Message:
        """Return the answer to a request.

        Raises:
            DataError: The template does not take the conversation.
            RenderingError: It took too long, or the process died.
        """
        try:
            write_message(self._pipe(self._process.stdin), request)
            reply = read_message(self._pipe(self._process.stdout), _MOST_REPLY_BYTES)
        except (OSError, ValueError) as error:
            self.close()
            raise RenderingError(
                f"the process that renders the template of {self._name} failed: {error}"
            ) from error
        if reply is None:
            self._process.wait()
            if self._process.returncode == -signal.SIGPROF:
                raise RenderingError(
                    f"the template of {self._name} did not finish within {SECONDS:g} s on one"
                    " conversation; a template must not loop for ever; correct it, or use another"
                    " --template"
                )
            raise RenderingError(
                f"the process that renders the template of {self._name} ended with status"
                f" {self._process.returncode}; correct the template, or use another --template"
            )
        if "error" in reply:
            raise DataError(f"the template of {self._name} fails: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # of a request that nobody read
                    continue

    @staticmethod
    def _pipe(pipe: object) -> BinaryIO:
        assert pipe is not None
        return pipe  # type: ignore[return-value]


def _cuts(turns: Turns, assistant: Sequence[int]) -> list[tuple[int, bool]]:
    """Return the beginnings to render: turns of each, and whether an assistant's is announced."""
    found = []
    for number in assistant:
        found.append((number, True))
        if number + 1 < len(turns):
            found.append((number + 1, False))
    return found


def _read_source(directory: Path, settings: TokenizerSettings) -> str:
    """Return the Jinja text of the template, as transformers chooses it.

    Raises:
        DataError: There is none.
    """
    content = read_beside(directory, TEMPLATE_FILE)
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{directory / TEMPLATE_FILE} is not UTF-8 ({error}); restore it"
            ) from error
    value = settings.files.get("tokenizer_config.json", {}).get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    if isinstance(value, str):
        return value
    raise DataError(
        f"{directory} has no template for conversations: neither {TEMPLATE_FILE} nor a"
        " chat_template in tokenizer_config.json; put one there, or use --template olmoe or zephyr"
    )


def _variables(settings: TokenizerSettings, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens by the names that templates call them."""
    found = {"eos_token": tokenizer.end.text}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in settings.files.get(name, {}).items():
            text = token_text(value)
            if key.endswith("_token") and text is not None:
                found[key] = text
    return found


def _unused(text: str) -> tuple[str, str]:
    """Return two characters of private use that a text does not have.

    Raises:
        DataError: It has all of them.
    """
    used = set(text)
    free = [chr(each) for each in range(_FIRST_PRIVATE, _LAST_PRIVATE) if chr(each) not in used]
    if len(free) < 2:
        raise DataError("a conversation has all characters of private use; take some out of it")
    return free[0], free[1]
