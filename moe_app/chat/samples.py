"""Makes tokens of conversations, with what counts of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.encoding import Span
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat.chat_config import Overlong
from moe_app.chat.dialogue import (
    ChatTemplate,
    Dialogue,
    TrainOn,
    counted_spans,
    is_counted,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds the tokens of one text."""

    ids: npt.NDArray[np.int32]
    """[n] of each token."""
    counted: npt.NDArray[np.bool_]
    """[n] whether its loss counts, given those before it; False for the first."""
    is_cut: bool = False
    """Whether there were more."""

    @property
    def num_counted(self) -> int:
        """Return how many tokens count."""
        return int(self.counted.sum())

    def cut(self, length: int) -> "Sample":
        """Return the first tokens."""
        if len(self.ids) <= length:
            return self
        return Sample(ids=self.ids[:length], counted=self.counted[:length], is_cut=True)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Holds a text beside its tokens."""

    text: str
    """What the template made."""
    offsets: list[Span]
    """The characters of each token."""
    sample: Sample
    """The tokens."""

    def cut(self, length: int) -> "Reading":
        """Return the first tokens, with the text as far as they go."""
        if len(self.offsets) <= length:
            return self
        offsets = self.offsets[:length]
        end = max((last for _, last in offsets), default=0)
        return Reading(text=self.text[:end], offsets=offsets, sample=self.sample.cut(length))


class OverlongError(DataError):
    """Reports a text of more tokens than a sequence has."""


@dataclass(frozen=True, kw_only=True)
class DialogueEncoder:
    """Encodes conversations."""

    tokenizer: Tokenizer
    """Encodes texts."""
    template: ChatTemplate
    """Makes them."""
    train_on: TrainOn
    """Which tokens count."""
    seq_length: int
    """Tokens that a text may have."""
    overlong: Overlong
    """What becomes of longer ones."""

    def encode(self, dialogue: Dialogue) -> Sample:
        """Return the tokens of a conversation.

        Raises:
            OverlongError: They are too many; with `truncate`, none of those that remain counts.
            DataError: It cannot be rendered or encoded, or no token counts.
        """
        whole = self.encode_whole(dialogue)
        if not whole.num_counted:
            raise DataError(
                "has no token that counts in the loss: the template makes nothing of the"
                " assistant's turns, or marks nothing; remove the row"
            )
        length = len(whole.ids)
        if length <= self.seq_length:
            return whole
        if self.overlong == "truncate":
            sample = whole.cut(self.seq_length)
            if sample.num_counted:
                return sample
        raise OverlongError(
            f"has {length:,} tokens, more than --seq-length {self.seq_length}; raise that, or use"
            " --overlong drop or truncate"
        )

    def encode_whole(self, dialogue: Dialogue) -> Sample:
        """Return the tokens of a conversation, however many.

        Raises:
            DataError: It cannot be rendered or encoded.
        """
        return self.read(dialogue).sample

    def read(self, dialogue: Dialogue) -> Reading:
        """Return the text of a conversation and its tokens, however many.

        Raises:
            DataError: It cannot be rendered or encoded.
        """
        rendered = self.template.render(dialogue.turns, has_targets=self.train_on != "all")
        encoding = self.tokenizer.encode_written(rendered.text, rendered.as_text)
        spans = counted_spans(rendered, dialogue, self.train_on)
        counted = np.array(is_counted(encoding.offsets, spans), dtype=np.bool_)
        counted[:1] = False
        sample = Sample(ids=np.array(encoding.ids, dtype=np.int32), counted=counted)
        return Reading(text=rendered.text, offsets=encoding.offsets, sample=sample)
