"""Check the data recipes in examples/ against the papers and the training recipes that use them."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.trainer.data.repetition import RepetitionRule
from moe_app.filter.filter_recipe import read_filter_recipe
from moe_app.filter.rules import LengthRule, StarcoderRule
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from tests.paths import REPO

EXAMPLES = REPO / "examples"
OLMOE, JETMOE = EXAMPLES / "olmoe_mix", EXAMPLES / "jetmoe_data"
COLUMNS = ("name", "hub_id", "files", "text_key", "filters", "layout")
TABLE_2 = {
    "dclm": 3860,
    "starcoder": 101,
    "pes2o": 57.2,
    "arxiv": 21.1,
    "open-web-math": 12.7,
    "algebraic-stack": 12.6,
    "wiki": 3.69,
}
"""Billions of tokens of OLMoE-Mix (arXiv 2409.02060, table 2)."""


def sources(folder: Path) -> list[dict[str, str]]:
    head, *rows = (line.split("\t") for line in (folder / "sources.tsv").read_text().splitlines())
    names = [head[0].removeprefix("# "), *head[1:]]
    assert tuple(names[:6]) == COLUMNS
    return [dict(zip(names, row, strict=True)) for row in rows]


def training(name: str) -> PretrainConfig:
    path = EXAMPLES / name
    return parse_recipe(["--config", str(path)], prog="test", description="")


def blend(data_path: tuple[str, ...]) -> dict[str, float]:
    return {
        prefix: float(weight)
        for weight, prefix in zip(data_path[::2], data_path[1::2], strict=True)
    }


def test_olmoe_mix_is_table_2_and_what_the_training_recipe_reads() -> None:
    rows = sources(OLMOE)
    tokens = {row["name"]: float(row["billion_tokens"]) for row in rows}
    assert tokens == TABLE_2
    read = blend(training("olmoe_1b_7b/olmoe_1b_7b.yaml").data.data_path)
    assert read == {f"data/olmoe-mix/{name}_text_document": each for name, each in tokens.items()}
    assert [row["name"] for row in rows if row["filters"] == "code"] == ["starcoder"]


@pytest.mark.parametrize("name", ["olmoe_1b_7b.yaml", "anneal.yaml"])
def test_olmoe_masks_sequences_that_repeat(name: str) -> None:
    assert training(f"olmoe_1b_7b/{name}").data.mask_repetitions


def test_shares_in_the_table_of_olmoe_mix_are_those_of_its_tokens_and_sum_to_one() -> None:
    table = re.findall(r"^\| `(.+?)` \| .* \| ([\d.,]+) \| ([\d.]+) % \|$", text(OLMOE), re.M)
    assert {name: float(tokens.replace(",", "")) for name, tokens, _ in table} == TABLE_2
    total = sum(TABLE_2.values())
    for name, _, share in table:
        assert float(share) == round(100 * TABLE_2[name] / total, 2)
    assert sum(float(share) for *_, share in table) == pytest.approx(100, abs=0.05)


def text(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def test_jetmoe_mixtures_sum_as_in_the_paper_and_are_what_the_training_recipe_reads() -> None:
    rows = sources(JETMOE)
    phases = training("jetmoe_8b/jetmoe_8b.yaml").data.phases
    for column, phase, total in zip(("phase1", "phase2"), phases, (100, 99.7), strict=True):
        weights = {row["name"]: float(row[column]) for row in rows if float(row[column])}
        assert sum(weights.values()) == pytest.approx(total)
        prefixes = {f"data/jetmoe/{name}_text_document": each for name, each in weights.items()}
        assert blend(phase.data_path) == prefixes


def test_filters_are_those_of_the_papers() -> None:
    repetition = RepetitionRule(repeats=32, min_period=1, max_period=13)
    stars = StarcoderRule(min_stars=2, top_word=0.3, top_two_words=0.5)
    wanted: dict[Path, list[Any]] = {
        OLMOE / "filters/text.yaml": [repetition],
        OLMOE / "filters/code.yaml": [stars, repetition],
        JETMOE / "filters/text.yaml": [LengthRule(min=1, unit="words"), repetition],
    }
    assert set(EXAMPLES.rglob("filters/*.yaml")) == wanted.keys()
    for path, rules in wanted.items():
        recipe = read_filter_recipe(str(path))
        assert [spec.options for spec in recipe["filters"]] == rules


@pytest.mark.parametrize("folder", [OLMOE, JETMOE], ids=lambda each: each.name)
def test_every_source_has_a_filter_and_hub_ids_that_the_table_names(folder: Path) -> None:
    names = [row["name"] for row in sources(folder)]
    assert len(set(names)) == len(names)
    for row in sources(folder):
        assert (folder / f"filters/{row['filters']}.yaml").is_file()
        assert f"`{row['name']}`" in text(folder)
        for hub_id in row["hub_id"].split(","):
            assert re.fullmatch(r"[\w-]+/[\w.-]+", hub_id)
            assert hub_id in text(folder)
        assert row["layout"] in ("as-is", "to_text")


@pytest.fixture(scope="module")
def to_text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("to_text", JETMOE / "to_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS: dict[str, dict[str, Any]] = {
    "math-ai/TemplateGSM": {"problem": "a", "solution_wocode": "b", "solution_code": "c"},
    "math-ai/StackMathQA": {"Q": "a", "A": "b", "meta": {}},
    "CohereForAI/xP3x": {"inputs": "a", "targets": "b"},
    "OpenAssistant/oasst1": {"text": "a"},
    "teknium/OpenHermes-2.5": {"conversations": [{"value": "a"}, {"value": "b"}]},
    "HuggingFaceH4/ultrachat_200k": {"messages": [{"content": "a"}, {"content": "b"}]},
    "bigcode/oasst-octopack": {"conversations": [{"text": "a"}, {"text": "b"}]},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"problem": "a", "solution": "b"},
    "ise-uiuc/Magicoder-Evol-Instruct-110K": {"instruction": "a", "response": "b"},
    "ajibawa-2023/Code-290k-ShareGPT": {"conversations": [{"value": "a"}, {"value": "b"}]},
    "bigcode/commitpackft": {"old_contents": "", "message": "a", "new_contents": "b"},
    "theblackcat102/evol-codealpaca-v1": {"instruction": "a", "output": "b"},
}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.jsonl"))
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]


def test_questions_and_answers_become_texts(tmp_path: Path, to_text: ModuleType) -> None:
    rows = {row["name"]: row for row in sources(JETMOE) if row["layout"] == "to_text"}
    assert rows.keys() == to_text.SOURCES.keys()
    for name, row in rows.items():
        assert row["hub_id"].split(",") == list(to_text.SOURCES[name])
    for hub_id, value in ROWS.items():
        write(tmp_path / "hub" / hub_id / "data/train.jsonl", value)
    for name in ("template-gsm", "stack-math-qa", "language-sft", "code-sft"):
        assert to_text.main([name, str(tmp_path)]) == 0
    assert texts(tmp_path / "raw/template-gsm") == ["a\n\nb\n\nc"]
    assert sorted(texts(tmp_path / "raw/language-sft")) == ["a", *["a\n\nb"] * 4]
    assert texts(tmp_path / "raw/code-sft") == ["a\n\nb"] * 5


def test_files_that_are_fetched_later_are_added(tmp_path: Path, to_text: ModuleType) -> None:
    folder = tmp_path / "hub/math-ai/StackMathQA"
    write(folder / "b.jsonl", {"Q": "b", "A": "2"})
    assert to_text.main(["stack-math-qa", str(tmp_path)]) == 0
    write(folder / "a.jsonl", {"Q": "a", "A": "1"})
    assert to_text.main(["stack-math-qa", str(tmp_path)]) == 0
    assert sorted(texts(tmp_path / "raw/stack-math-qa")) == ["a\n\n1", "b\n\n2"]


def test_parts_of_the_pile_are_parted(
    tmp_path: Path, to_text: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["Wikipedia (en)", "StackExchange", "ArXiv", "Pile-CC", "Github"]
    rows = [{"text": part, "meta": {"pile_set_name": part}} for part in parts]
    path = tmp_path / "hub/monology/pile-uncopyrighted/train/00.jsonl"
    write(path, *rows)
    names = ("pile-wikipedia", "pile-stackexchange", "pile-arxiv", "pile-remaining")
    found = []
    for name in names:
        assert to_text.main([name, str(tmp_path)]) == 0
        found.append(texts(tmp_path / "raw" / name))
    assert found == [parts[:1], parts[1:2], parts[2:3], parts[3:]]
    write(path.with_name("01.jsonl"), {"text": "a"})
    assert to_text.main(["pile-arxiv", str(tmp_path)]) == 2
    assert "01.jsonl, line 1: KeyError 'meta'" in capsys.readouterr().err


STAND_IN = """#!/bin/bash
# Stands for the tools: finds finished what the file `checked` says, and makes empty files.
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
*--check*) echo "its manifest differs"; exit "$(cat checked)" ;;
*filter_data.py*) mkdir -p data/filtered/a; touch data/filtered/a/summary.json ;;
*) touch data/a_text_document.idx ;;
esac
"""


def test_token_files_of_other_work_are_not_taken_for_finished(tmp_path: Path) -> None:
    (tmp_path / "recipe/filters").mkdir(parents=True)
    (tmp_path / "recipe/filters/text.yaml").write_text("tokenizer_type: HFTokenizer\n")
    (tmp_path / "recipe/sources.tsv").write_text("a\tb/c\t*\tcontent\ttext\tas-is\t1\n")
    (tmp_path / "data/raw/a").mkdir(parents=True)
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "tool").write_text(STAND_IN)
    (tmp_path / "tool").chmod(0o755)

    def prepare(checked: int) -> tuple[int, list[str], str]:
        (tmp_path / "checked").write_text(f"{checked}\n")
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            [
                "bash",
                str(EXAMPLES / "slurm/prepare_sources.sh"),
                "recipe",
                "data",
                "tokenizer.json",
            ],
            cwd=tmp_path,
            env={"PATH": os.defpath, "REPO": str(REPO), "PYTHON": str(tmp_path / "tool")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, [Path(each.split()[0]).stem for each in calls], done.stderr

    index = tmp_path / "data/a_text_document.idx"
    index.touch()
    status, called, said = prepare(0)
    assert (status, called) == (2, []) and "which it must be made of, is not finished" in said
    index.unlink()
    assert prepare(0)[:2] == (0, ["filter_data", "preprocess_data"])
    assert prepare(0)[:2] == (0, ["filter_data", "preprocess_data"])  # the second is a check
    status, called, said = prepare(1)
    assert (status, called) == (2, ["filter_data", "preprocess_data"])
    assert "its manifest differs; move or remove data/a_text_document.bin" in said
    (tmp_path / "data/a_text_document.part").mkdir()  # a start that was killed goes on
    assert prepare(1)[:2] == (0, ["filter_data", "preprocess_data"])
