"""Make tokenizers and conversations for the tests of conversation data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError
from moe_app.chat import render_worker
from moe_app.chat.dialogue import Turn, Turns
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ODD: dict[str, Turns] = {
    name: tuple(Turn(*each) for each in turns)
    for name, turns in {
        "plain": [("user", "the quick fox?"), ("assistant", "jumps over")],
        "system only": [("system", "be brief")],
        "one role twice": [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")],
        "empty content": [("system", ""), ("user", ""), ("assistant", ""), ("user", "x")],
        "space at borders": [("user", " \n"), ("assistant", "\n\n  x \n"), ("user", "y \n\t")],
        "assistant first": [("assistant", "hello"), ("user", "")],
        "other scripts": [("user", "你好世界 🦊"), ("assistant", "Здравствуй, नमस्ते e\u0301")],
        "markers spelled": [("user", "<|user|>\nno"), ("assistant", "<|assistant|>\n[INST]")],
    }.items()
}
"""Conversations that spell no control token."""


def make_tokenizer(directory: Path, **files: Any) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Write a tokenizer; return the project's and transformers' reading of it."""
    config = {"eos_token": END, "bos_token": END, **files.pop("tokenizer_config", {})}
    path = make_hf_tokenizer(directory, SPECIAL, tokenizer_config=config, **files)
    theirs = PreTrainedTokenizerFast(tokenizer_file=path, eos_token=END, bos_token=END)
    return load_tokenizer("HFTokenizer", path), theirs


def transformers_reads(
    theirs: PreTrainedTokenizerFast, turns: Turns, source: str
) -> tuple[list[int], list[bool]]:
    """What transformers makes of a conversation: its tokens, and the mask of the assistant's."""
    found: Any = theirs.apply_chat_template(
        as_messages(turns),
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], [bool(each) for each in found["assistant_masks"]]


def as_messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def write_rows(path: Path, rows: Sequence[object]) -> str:
    """Write JSON Lines; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


class RenderHere:
    """Renders in this process, to spare the start of another; without limits."""

    def __init__(self, source: str, variables: Mapping[str, str], name: str) -> None:
        self._render = render_worker.make_rendering(source, dict(variables))
        self._name = name

    def ask(self, request: render_worker.Message) -> render_worker.Message:
        try:
            return render_worker.answer(self._render, json.loads(json.dumps(request)))
        except Exception as error:
            raise DataError(f"the template of {self._name} fails: {error}") from error

    def close(self) -> None:
        pass
