"""Holds conversations, and how a template wrote one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron.trainer.data.encoding import Span

ASSISTANT = "assistant"
"""The role whose turns a model learns to write."""
TrainOn = Literal["all", "assistant", "last"]
"""Which tokens of a conversation count in the loss."""
ChatKind = Literal["sft", "preference", "kto"]
"""What a row of the data holds."""


@dataclass(frozen=True)
class Turn:
    """Holds what one side says."""

    role: str
    content: str


Turns = tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Holds the turns of one text to train on."""

    turns: Turns
    first_counted: int = 0
    """Turns before this one are a prompt, none of whose tokens count."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Locates what an assistant's turn makes of a text, with the token that ends it."""

    turn: int
    """Number of the turn."""
    span: Span
    """Characters of the text."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Holds the text that a template makes of a conversation."""

    text: str
    """The whole text; a model's control tokens are written in it."""
    targets: tuple[Target, ...]
    """What assistants wrote, in order."""
    as_text: tuple[Span, ...] = ()
    """Where a turn only spells control tokens."""


class ChatTemplate(Protocol):
    """Declares what makes texts of conversations."""

    @property
    def identity(self) -> str:
        """Return what tells its texts from those of other templates."""

    def render(self, turns: Turns, *, has_targets: bool = True) -> Rendered:
        """Return the text of a conversation.

        Args:
            turns: Of it.
            has_targets: Say what the assistant wrote; where all of the text counts, nobody asks.

        Raises:
            DataError: The template does not take it, or does not say what the assistant wrote.
        """

    def announce(self, turns: Turns) -> Rendered:
        """Return the text of a conversation up to where an assistant's next turn begins.

        Raises:
            DataError: The template does not take it.
        """

    def close(self) -> None:
        """Give back what rendering holds."""


def counted_spans(rendered: Rendered, dialogue: Dialogue, train_on: TrainOn) -> list[Span]:
    """Return the characters whose tokens count in the loss."""
    if train_on == "all":
        return [(0, len(rendered.text))]
    own = [each for each in rendered.targets if each.turn >= dialogue.first_counted]
    if train_on == "last":
        latest = max((each.turn for each in own), default=-1)
        own = [each for each in own if each.turn == latest]
    return [each.span for each in own]


def is_counted(offsets: Sequence[Span], spans: Iterable[Span]) -> list[bool]:
    """Return for each token whether it overlaps one of the spans.

    A token that crosses the beginning of a span counts, as in transformers' mask of the assistant's
    tokens.

    Args:
        offsets: The characters of each token, in order.
        spans: In order, apart from each other.
    """
    waiting = list(reversed(list(spans)))
    found = []
    for first, last in offsets:
        while waiting and first >= waiting[-1][1]:
            waiting.pop()
        found.append(bool(waiting) and last > waiting[-1][0])
    return found
