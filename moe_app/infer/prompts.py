"""Reads the prompts that a model continues: texts, tokens, and conversations that it answers."""

import argparse
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.trainer.data.jsonl import TextLines
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.lines import read_tokens
from moe_app.infer import open_model
from moe_app.infer.conversations import MESSAGES_KEY, Conversations
from moe_app.infer.stop import Stops, check_utf8, collect_stops

logger = logging.getLogger("generate")

OUTPUT_KEYS = ("completion", "completion_tokens", "finish_reason", "stop_reason")
"""The keys that `--output` adds to each object."""


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """Holds a prompt, and the record its continuation is added to."""

    ids: list[int]
    """Tokens of the prompt, at least one."""
    record: dict[str, Any]
    """What the output keeps."""
    is_conversation: bool = False
    """Whether the model answers, and does not continue a text."""


@dataclass(frozen=True, kw_only=True)
class GenerationInput:
    """Holds what rank 0 reads and all ranks need."""

    tasks: list[GenerationTask]
    """In the order of the input."""
    stops: Stops
    """What ends a text."""
    vocab_size: int
    """Ids of the tokenizer; no others are drawn."""


def read_input(
    args: argparse.Namespace, opened: open_model.OpenedCheckpoint, tokenizer: Tokenizer
) -> GenerationInput:
    """Read every prompt.

    Raises:
        ConfigError: a prompt is empty, or too long to be continued within the length that the
            model was trained on.
        DataError: the same for a line of `--input`, or it is not a prompt.
    """
    seq_length, path = opened.saved.training.seq_length, opened.found.path
    conversations = Conversations(
        args.template, tokenizer, checkpoint=path, tokenizer_path=args.tokenizer_model
    )
    with contextlib.closing(conversations):
        if args.input is None:
            tasks = read_prompts(args, tokenizer, conversations, seq_length=seq_length)
        else:
            tasks = read_lines(args, tokenizer, conversations, seq_length=seq_length)
        stops = collect_stops(args, tokenizer, path, turn_end=conversations.find_end())
    return GenerationInput(tasks=tasks, stops=stops, vocab_size=tokenizer.vocab_size)


def read_prompts(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    conversations: Conversations,
    *,
    seq_length: int,
) -> list[GenerationTask]:
    """Return the prompts of the command line; see `read_input`."""
    is_user = args.template is not None
    encode = conversations.encode_user if is_user else tokenizer.encode_document
    return [
        GenerationTask(
            ids=encode_prompt(args, encode, number, seq_length=seq_length),
            record={"prompt": text},
            is_conversation=is_user,
        )
        for number, text in enumerate(args.prompt, start=1)
    ]


def read_lines(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    conversations: Conversations,
    *,
    seq_length: int,
) -> list[GenerationTask]:
    """Return the prompts of `--input`; see `read_input`."""
    is_user = args.template is not None
    source = TextLines(args.input)
    lines = list(
        read_tokens(
            source,
            text_key="prompt",
            encode=conversations.encode_user if is_user else tokenizer.encode_document,
            vocab_size=tokenizer.vocab_size,
            max_tokens=seq_length - args.max_new_tokens,
            rule=f"because with --max-new-tokens {args.max_new_tokens} they must fit into"
            f" {seq_length}, the --seq-length of training",
            written_keys=OUTPUT_KEYS,
            others={MESSAGES_KEY: conversations.encode_messages},
        )
    )
    source.log_blank(logger)
    if not lines:
        raise ConfigError(
            f"{source.name} has no lines; there is nothing to continue; name another --input"
        )
    return [
        GenerationTask(
            ids=line.ids,
            record=line.record,
            is_conversation=MESSAGES_KEY in line.record or (is_user and "prompt" in line.record),
        )
        for line in lines
    ]


def encode_prompt(
    args: argparse.Namespace,
    encode: Callable[[str], list[int]],
    number: int,
    *,
    seq_length: int,
) -> list[int]:
    """Return the tokens of `--prompt` number `number`, counted from 1; see `read_input`."""
    text = args.prompt[number - 1]
    check_utf8(text, what=f"--prompt number {number} ({text!r})", kind="prompts")
    ids = encode(text)
    if not ids:
        raise ConfigError(
            f"--prompt number {number} ({text!r}) has no tokens; the model continues at"
            " least one; give it some text"
        )
    if len(ids) + args.max_new_tokens > seq_length:
        raise ConfigError(
            f"--prompt number {number} has {len(ids)} tokens and --max-new-tokens is"
            f" {args.max_new_tokens}; together they must be at most {seq_length}, the"
            " --seq-length of training; shorten the prompt or lower --max-new-tokens"
        )
    return ids
