"""Defines the settings of conversation data; one group for fine-tuning and alignment."""

from dataclasses import dataclass
from typing import Literal

from megatron.trainer.errors import ConfigError
from moe_app.chat.dialogue import ChatKind, TrainOn

Overlong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, kw_only=True)
class ChatDataConfig:
    """Sets what conversations are read, how they are written, and which of their tokens count."""

    train_data: tuple[str, ...] = ()
    """Files to train on: JSON Lines (plain, gzip or zstd), Parquet, folders and patterns of them,
    or a directory of Dataset.save_to_disk."""
    valid_data: tuple[str, ...] = ()
    """Files to evaluate on."""
    template: Literal["olmoe", "zephyr", "tokenizer"] = "olmoe"
    """What makes a text of a conversation; tokenizer means the Jinja template beside the
    tokenizer."""
    train_on: TrainOn = "assistant"
    """Which tokens count: those of assistants' turns with the tokens that end them, of the last
    such turn, or all."""
    overlong: Overlong = "drop"
    """What is done with a text of more than seq_length tokens."""
    packing: bool | None = None
    """Put several texts into one sequence, apart from each other; None means on for fine-tuning and
    off for alignment."""
    max_bad_rows: int = 0
    """Rows that may be skipped because they hold no conversation."""
    tokenize_workers: int | None = None
    """Processes that tokenize; None means one for each core of this job, up to 16, or one alone for
    files of less than 8 MB. The tokens do not depend on it."""
    data_cache: str | None = None
    """Where tokens are kept; None means beside the first file."""
    messages_key: str = "messages"
    """Key of a conversation in a row."""
    role_key: str = "role"
    """Key of the role in a turn."""
    content_key: str = "content"
    """Key of the text in a turn."""
    prompt_key: str = "prompt"
    """Key of the prompt: a text or a list of turns."""
    chosen_key: str = "chosen"
    """Key of the better answer, or of the conversation that ends with it."""
    rejected_key: str = "rejected"
    """Key of the worse answer, or of the conversation that ends with it."""
    completion_key: str = "completion"
    """Key of an answer that was judged."""
    label_key: str = "label"
    """Key of the judgement: true for a desirable answer."""

    def has_packing(self, kind: ChatKind) -> bool:
        """Return whether texts of a kind of data are packed."""
        return kind == "sft" if self.packing is None else self.packing

    def check(self, kind: ChatKind) -> None:
        """Refuse settings that make no sense together.

        Raises:
            ConfigError: They do not.
        """
        if self.max_bad_rows < 0:
            raise ConfigError(
                f"--max-bad-rows is {self.max_bad_rows}; it must be >= 0; 0 lets no row be bad"
            )
        if self.tokenize_workers is not None and self.tokenize_workers < 1:
            raise ConfigError(
                f"--tokenize-workers is {self.tokenize_workers}; it must be >= 1; leave it out for"
                " as many as there are cores"
            )
        if kind != "sft" and self.train_on == "all":
            raise ConfigError(
                "--train-on is all, but alignment compares answers to a prompt, whose own tokens"
                " must not count; use assistant or last"
            )
