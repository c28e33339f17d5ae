"""Writes conversations as OLMoE-Instruct and JetMoE-chat were trained on them.

Markers of roles are plain text. Each template is here twice, as a function and in Jinja: the latter
goes with a model to whoever chats with it, and a test compares the two.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron.trainer.data.encoding import Span
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat.dialogue import ASSISTANT, Rendered, Target, Turns

_ROLES = ("system", "user", ASSISTANT)

_OLMOE_JINJA = """\
{{- BOS -}}
{%- for message in messages -%}
{%- set is_end = loop.last and not add_generation_prompt -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>\\n' -}}
{%- generation -%}{{- message['content'] + EOS -}}{%- endgeneration -%}
{{- '' if is_end else '\\n' -}}
{%- elif message['role'] in ['system', 'user'] -%}
{%- set turn = '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' -%}
{{- turn.rstrip() if is_end else turn -}}
{%- else -%}
{{- raise_exception('the role ' + message['role'] + ' is not system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
_ZEPHYR_JINJA = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the role ' + message['role'] + ' is not system, user or assistant') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + EOS -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + EOS -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class TemplateRule:
    """Says how a template of the project writes a conversation."""

    jinja: str
    """The same for transformers, with BOS and EOS in place of those tokens' texts."""
    begins_with_bos: bool
    """Put the beginning of a document first."""
    ends: Callable[[str], bool]
    """Whether the end token follows a turn of a role."""
    strips: bool
    """Take white space away from the end of the text."""


TEMPLATES: dict[str, TemplateRule] = {
    # Open Instruct, as OLMoE-Instruct's logs have it.
    "olmoe": TemplateRule(
        jinja=_OLMOE_JINJA,
        begins_with_bos=True,
        ends=lambda role: role == ASSISTANT,
        strips=True,
    ),
    # Zephyr's, which JetMoE-chat has.
    "zephyr": TemplateRule(
        jinja=_ZEPHYR_JINJA, begins_with_bos=False, ends=lambda role: True, strips=False
    ),
}
"""The templates of the project, by name."""


class BuiltinTemplate:
    """Writes conversations by one of `TEMPLATES`.

    Args:
        name: Its name there.
        tokenizer: Has the tokens that begin and end texts.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self._rule = TEMPLATES[name]
        self._bos, self._eos = _end_texts(tokenizer)
        self._spelled = control_pattern(tokenizer)
        self.identity: str = f"{name} {self._bos!r} {self._eos!r} {self._rule.jinja}"

    def render(self, turns: Turns, *, has_targets: bool = True) -> Rendered:
        """Return the text of a conversation.

        Raises:
            DataError: It has a role that the template does not know.
        """
        return self._write(turns, is_announced=False)

    def announce(self, turns: Turns) -> Rendered:
        """Return the text of a conversation up to where an assistant's next turn begins.

        Raises:
            DataError: It has a role that the template does not know.
        """
        return self._write(turns, is_announced=True)

    def _write(self, turns: Turns, *, is_announced: bool) -> Rendered:
        text = self._bos if self._rule.begins_with_bos else ""
        targets: list[Target] = []
        contents: list[Span] = []
        for number, turn in enumerate(turns):
            if turn.role not in _ROLES:
                raise DataError(
                    f"turn {number + 1} has the role {turn.role!r}; the template knows"
                    f" {', '.join(_ROLES)}; rename it, or use another --template"
                )
            text += f"<|{turn.role}|>\n"
            begin = len(text)
            text += turn.content
            contents.append((begin, len(text)))
            text += self._eos if self._rule.ends(turn.role) else ""
            if turn.role == ASSISTANT:
                targets.append(Target(turn=number, span=(begin, len(text))))
            text += "\n"
        if is_announced:
            text += f"<|{ASSISTANT}|>\n"
        elif self._rule.strips:
            text = text.rstrip()
        spans = tuple(
            span
            for span, turn in zip(contents, turns, strict=True)
            if self._spelled.search(turn.content)
        )
        return Rendered(text=text, targets=tuple(targets), as_text=spans)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def jinja_source(name: str, tokenizer: Tokenizer) -> str:
    """Return a template of the project as transformers takes it, for one tokenizer."""
    texts = dict(zip(("BOS", "EOS"), _end_texts(tokenizer), strict=True))
    return re.sub(
        r"\b(BOS|EOS)\b",
        lambda found: json.dumps(texts[found[1]], ensure_ascii=False),
        TEMPLATES[name].jinja,
    )


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return what finds the control tokens that a turn spells, in any letter case."""
    longest_first = sorted(filter(None, tokenizer.control_texts()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)


def _end_texts(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return how the tokens that begin and end a text are written; OLMoE's are the same."""
    bos = "".join(tokenizer.token_text(each) or "" for each in tokenizer.prefix)
    return bos or tokenizer.end.text, tokenizer.end.text
