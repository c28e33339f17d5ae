"""A model that learned a few answers gives them here, exported, and imported again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_app.convert import convert_checkpoint
from moe_app.finetune import finetuning
from moe_app.infer import generate
from tests.distributed.convert_models import make_hf
from tests.unit.app.chat.make_chat import write_rows
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

# From torch when it reads a checkpoint, and from megatron-core about its embedding and loss.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

END = "<|endoftext|>"
MOST = 24
ANSWERS = {"who jumps?": "the fox", "who is lazy?": "the dog", "how?": "over", "ok?": ""}
TEMPLATES = {"olmoe": "olmoe", "jetmoe": "zephyr"}


def messages(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


ASKED = [
    *(messages(question) for question in ANSWERS),
    messages("who jumps?", "the fox", "how?"),
    [{"role": "system", "content": "be brief"}, *messages("never heard of 你好")],
]


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tune a random model until it knows some answers, export it, and import that."""
    torch.utils._device._device_constructors()  # filled before factories are patched
    where = tmp_path_factory.mktemp(request.param)
    ids = {"eos_token_id": 0, "bos_token_id": 0}
    sizes: dict[str, Any] = {"dtype": torch.float32, "vocab_size": 289, **ids}
    hf, _ = make_hf(where / "hf", request.param, "fused", tie_word_embeddings=False, **sizes)
    make_hf_tokenizer(hf, [END], tokenizer_config={"eos_token": END, "bos_token": END})
    load(["import", "--hf", str(hf), "--save", str(where / "base")])
    rows = [{"messages": messages(*pair)} for pair in ANSWERS.items()]
    flags = ["--load", str(where / "base"), "--save", str(where / "tuned"), "--seq-length", "96"]
    flags += ["--train-data", write_rows(where / "chat.jsonl", rows), "--no-packing"]
    flags += ["--template", TEMPLATES[request.param], "--lr", "1e-2", "--train-iters", "40"]
    flags += ["--global-batch-size", "4", "--micro-batch-size", "4", "--device", "cpu"]
    assert finetuning.main(flags) == 0
    load(["export", "--load", str(where / "tuned"), "--hf", str(where / "out")])
    load(["import", "--hf", str(where / "out"), "--save", str(where / "again")])
    return where


def load(arguments: list[str]) -> None:
    assert convert_checkpoint.main(arguments) == 0


def answers(run: Path, *flags: str) -> list[dict[str, Any]]:
    source = write_rows(run / "asked.jsonl", [{"messages": each, "id": 7} for each in ASKED])
    output = run / "answered.jsonl"
    more = ["--input", source, "--output", str(output), "--max-new-tokens", str(MOST)]
    assert generate.main(["--load", str(run), "--greedy", "--device", "cpu", *more, *flags]) == 0
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_greedy_answers_are_those_of_transformers(folder: Path) -> None:
    ours = answers(folder / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "out", local_files_only=True)
    for asked, found in zip(ASKED, ours, strict=True):
        prompt: Any = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(**prompt, do_sample=False, max_new_tokens=MOST)
        new = whole[0, prompt["input_ids"].shape[1] :].tolist()
        assert found["completion_tokens"] == new
        assert found["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (found["messages"], found["id"]) == (asked, 7)
    # What was learned is known, with the token that ends it.
    assert [found["completion"] for found in ours[: len(ANSWERS)]] == list(ANSWERS.values())
    assert {found["stop_reason"] for found in ours[: len(ANSWERS)]} == {0}
    # The same from a checkpoint whose only word on templates is the export's own.
    again = answers(folder / "again")
    assert [each["completion_tokens"] for each in again] == [
        each["completion_tokens"] for each in ours
    ]


def test_prompt_with_a_template_is_what_a_user_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--load", str(folder / "tuned"), "--greedy", "--max-new-tokens", "8"]
    flags = [*run, "--device", "cpu", "--prompt", "who is lazy?"]
    name = (folder / "tuned/iter_0000040/config.yaml").read_text()
    template = "olmoe" if "template: olmoe" in name else "zephyr"
    capsys.readouterr()
    assert generate.main([*flags, "--template", template]) == 0
    assert capsys.readouterr().out == "the dog\n"
    assert generate.main(flags) == 0
    assert capsys.readouterr().out.startswith("who is lazy?")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "line 1: 'messages' has no list of turns, or an empty one; it must"),
        ({"messages": [{"role": "user"}]}, "line 1: 'messages' has no role and content in turn 1"),
        ({"messages": [{"role": "user", "content": 1}]}, "line 1, turn 1: 'content' "),
        ({"messages": [{"role": "me", "content": ""}]}, "line 1: turn 1 has the role 'me'"),
        ({"messages": [], "prompt": ""}, "line 1: has 'prompt' and 'messages'; each object needs"),
        ({"messages": messages("a" * 90)}, "line 1: 'messages' has "),
    ],
)
def test_conversation_that_cannot_be_answered_is_named(
    line: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(folder / "bad.jsonl", [line])
    flags = ["--load", str(folder / "tuned"), "--template", "olmoe", "--device", "cpu"]
    assert generate.main([*flags, "--input", source]) == 2
    assert message in capsys.readouterr().err
