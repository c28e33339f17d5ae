"""Checks the questions and answers, the recipes and the figures of examples/adapt_tiny."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.trainer.checkpoint import layout
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.validate import validate
from megatron.trainer.data.tokenizer import load_tokenizer
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.align.align_config import AlignConfig
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_files import BadRows, find_chat_files, read_units
from moe_app.chat.dialogue import ChatKind
from moe_app.finetune.tuning_config import FinetuneConfig, TuningConfig, parse_tuning
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.presets import PRESETS
from tests.paths import REPO
from tests.unit.trainer.data.make_tokenizers import make_sentencepiece

FOLDER = REPO / "examples" / "adapt_tiny"
KINDS: dict[str, ChatKind] = {"chats": "sft", "pairs": "preference", "judged": "kto"}
RECIPES: dict[str, type[TuningConfig]] = {
    "sft": FinetuneConfig,
    "dpo": AlignConfig,
    "kto": AlignConfig,
}
LIBRARY = {
    "box.py": '''
class Box:
    """Holds a number of things at once. It is small."""

    def open(self, wide=True, *, slowly):
        """Open the box for whoever wants to look."""

    def _hidden(self):
        """Do what nobody may ask for here."""
''',
    "shelf/__init__.py": '''
def put(thing, /, place: int = 0):
    """Put a thing on its place, then

    say where it is."""

def take(*things):
    """Take all of the things away again."""
''',
    "_private.py": '"""No."""\ndef f():\n    """Be private in every way there is."""\n',
    "broken.py": "def (:\n",
}
QUESTIONS = {
    "What does box.Box do?": "Holds a number of things at once.",
    "Where is box.Box?": "The class Box is in the module box.",
    "What does box.Box.open do?": "Open the box for whoever wants to look.",
    "How do I call box.Box.open?": "Call it as open(wide=True, *, slowly).",
    "What does shelf.take do?": "Take all of the things away again.",
    "How do I call shelf.take?": "Call it as take(*things).",
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"adapt_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_questions_are_about_docstrings_and_signatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    made = script("make_pairs")
    monkeypatch.setattr(made, "NUM_TRAIN", 4)
    monkeypatch.setattr(made, "NUM_HELD_OUT", 2)
    for folder in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["make_pairs.py", str(tmp_path / folder)])
        assert made.main() == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    rows = {name: read(tmp_path / "one" / f"{name}.jsonl") for name in ("pairs_train", "questions")}
    held_out = read(tmp_path / "one" / "pairs_held_out.jsonl")
    pairs = [*rows["pairs_train"], *held_out]
    assert {row["prompt"]: row["chosen"] for row in pairs} == QUESTIONS
    assert [row["rule"] for row in pairs] == ["twice", "form"] * 3
    for row in pairs:
        form = row["prompt"].split()[0]
        if row["rule"] == "twice":
            assert row["rejected"] == f"{row['chosen']} {row['chosen']}"
        else:
            (question,) = [q for q, answer in QUESTIONS.items() if answer == row["rejected"]]
            assert question.split()[0] != form
    assert {row["messages"][0]["content"]: row["expected"] for row in rows["questions"]} == {
        row["prompt"]: row["chosen"] for row in held_out
    }
    chats = read(tmp_path / "one" / "chats_train.jsonl")
    said = [row["messages"][1]["content"] for row in chats]
    expected = [row["chosen"] for row in pairs[:4]]
    assert said == [expected[0], *(f"{each} {each}" for each in expected[1:])]
    for name, kind in KINDS.items():
        files = find_chat_files([str(tmp_path / "one" / f"{name}_train.jsonl")], flag="")
        units = [unit for _, unit in read_units(files, kind, ChatDataConfig(), BadRows(0))]
        assert len(units) == 4


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_for_the_ranks_it_names(name: str, tmp_path: Path) -> None:
    path = layout.final_path(tmp_path / "run", 1)
    path.mkdir(parents=True)
    saved = PretrainConfig(model=MoEModelConfig(**PRESETS["olmoe_tiny"]))
    (path / CONFIG_NAME).write_text(dump_config(saved))
    (path / "tokenizer.model").write_text("")
    recipe = FOLDER / f"{name}.yaml"
    assert recipe.read_text("utf-8").startswith("# ranks: 2\n")
    argv = ["--config", str(recipe), "--load", str(tmp_path / "run")]
    validate(parse_tuning(RECIPES[name], argv, prog="test", description=""), 2)


def test_lines_have_the_tokens_of_training(tmp_path: Path) -> None:
    model = make_sentencepiece(tmp_path, control=["<|endoftext|>"])
    pair = {"prompt": "q?", "chosen": "the fox", "rejected": "no", "rule": "twice"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    script("held_out").lines(str(tmp_path / "pairs.jsonl"), model, str(tmp_path / "lines.jsonl"))
    own = load_tokenizer("SentencePieceTokenizer", model)
    for row, answer in zip(read(tmp_path / "lines.jsonl"), ("the fox", "no"), strict=True):
        text = f"{own.end.text}<|user|>\nq?\n<|assistant|>\n{answer}{own.end.text}"
        assert row["tokens"] == own.encode_written(text).ids
        assert own.decode(row["tokens"][-row["num_answer"] : -1]) == answer
        assert row["tokens"][-1] == own.eod


def test_accuracy_is_the_share_of_pairs_in_the_right_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compares with figures that were worked out by hand."""
    held_out = script("held_out")

    def scored(name: str, *values: list[float]) -> str:
        rules = ["twice", "twice", "form", "form"]
        rows = [
            {"rule": rule, "num_answer": len(each), "token_logprobs": [-9.0, *each]}
            for rule, each in zip(rules, values, strict=True)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{name}={path}"

    # A token: -1 and -0.5; then -3 and -4.
    before = scored("before", [-1.0, -1.0], [-0.5], [-3.0], [-4.0])
    # In all: 1 better and 3 worse; then 1 worse and 2 better.
    after = scored("after", [-0.5, -0.5], [-3.5], [-4.0], [-2.0])
    held_out.accuracy("0.5", [before, after])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["model", "form", "twice", "all"]
    assert lines[2] == ["before", "100.0%", "0.0%", "50.0%"]
    assert lines[3] == ["after", "0.0%", "100.0%", "50.0%"]
    assert lines[-1] == ["after", "0.0%", "100.0%", "50.0%", "+0.00", "-0.25"]
