"""Tests recipes, tools' help, links, documents and file conventions of the repository."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.trainer import loop
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.records.record_file import Record
from megatron.trainer.step import StepResult
from moe_app.align.preference import DPOObjective, KTOObjective
from moe_app.cli import COMMANDS, main
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.pretrain.hooks import RouterHealth
from moe_app.tasks.passes import score_record
from moe_ext.metrics import RouterMetrics
from tests.paths import REPO

OBJECTIVE_KEYS = (
    "lm_loss",
    *DPOObjective.metric_names,
    *KTOObjective.metric_names,
    "rewards_margin",
)

RECIPES = sorted(
    path
    for path in (REPO / "examples").rglob("*.yaml")
    # Those of fine-tuning and alignment are in app/align/test_tuning_recipes.py.
    # Files of studies are in app/ablate/test_studies_file.py.
    if path.parent.name != "filters"
    and path.name != "studies.yaml"
    and "train_data:" not in path.read_text("utf-8")
)
TOOLS = sorted(path.stem for path in (REPO / "tools").glob("*.py"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "tests/**/*.md")
    for path in REPO.glob(pattern)
)
LETTERS = ("s", "b", "h", "t", "e", "el", "k", "f", "np", "hn", "ng", "v")
SHORT = ("TP", "SP", "PP", "EP", "ETP", "DP")
MAX_BYTES = 500_000


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def parse(path: Path) -> PretrainConfig:
    return parse_recipe(["--config", str(path)], prog="test", description="")


def test_there_are_recipes_and_documents() -> None:
    assert REPO / "examples/olmoe_1b_7b/olmoe_1b_7b.yaml" in RECIPES
    assert {"pretrain", "preprocess_data", "train_tokenizer", "build_corpus"} <= set(TOOLS)
    assert REPO / "docs/architecture.md" in DOCUMENTS


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_is_valid_for_the_ranks_it_names(path: Path) -> None:
    first = path.read_text("utf-8").partition("\n")[0]
    named = re.fullmatch(r"# ranks: (\d+)", first)
    assert named, f"{relative(path)} must start with a line like '# ranks: 8', not {first!r}"
    validate(parse(path), int(named[1]))


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_printed_config_reloads_to_the_same_config(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(["--config", str(path), "--print-config"], prog="test", description="")
    assert exit_.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse(printed) == parse(path) != PretrainConfig()


def test_olmoe_recipe_has_the_papers_numbers() -> None:
    """Compares with arXiv 2409.02060: table 10, section 2 and the text of section 4.1."""
    cfg = parse(REPO / "examples/olmoe_1b_7b/olmoe_1b_7b.yaml")
    training, optimizer, model = cfg.training, cfg.optimizer, cfg.model
    tokens_per_step = training.global_batch_size * training.seq_length
    assert tokens_per_step == 4_194_304
    assert round(training.train_iters * tokens_per_step / 1e9) == 5033
    assert round(optimizer.lr_warmup_iters * tokens_per_step / 1e6) == 10_486
    assert optimizer.lr_decay_iters is not None
    assert round(optimizer.lr_decay_iters * tokens_per_step / 1e9) == 5000
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_init) == (4e-4, 4e-5, 4e-5)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.weight_decay_on, optimizer.clip_grad) == (
        0.1,
        "all",
        1.0,
    )
    assert (model.num_experts, model.moe_router_topk) == (64, 8)
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff) == (0.01, 0.001)
    shares = [float(weight) for weight in cfg.data.data_path[::2]]
    # The table rounds its total to 4,060; its rows add up to 4,068.
    assert sum(shares) == pytest.approx(4068.29)


def test_every_tool_is_a_command() -> None:
    assert sorted(command.tool for command in COMMANDS.values()) == TOOLS


@pytest.mark.parametrize("name", TOOLS)
def test_tool_starts_its_command(name: str) -> None:
    source = (REPO / "tools" / f"{name}.py").read_text("utf-8")
    command = next(each for each in COMMANDS.values() if each.tool == name)
    assert command.run.__name__ == name
    assert f"from moe_app.cli import {name}\n" in source and f"sys.exit({name}())" in source


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megatron-moe", name])
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code in (0, None)
    assert f"usage: megatron-moe {name} " in capsys.readouterr().out


def test_console_command_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z-]+)  +\w", capsys.readouterr().out, re.M)
    assert listed == list(COMMANDS)
    assert main(["pretran"]) == 2
    assert "no command 'pretran'; did you mean 'pretrain'?" in capsys.readouterr().err


def test_pretraining_starts_as_a_module_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_app.pretrain", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""  # no warning of megatron-core's imports


def broken_links(document: Path) -> list[str]:
    """List relative links to missing files."""
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    return [name for name in local if name and not (document.parent / name).exists()]


def missing_paths(document: Path) -> list[str]:
    """List missing paths of this repository that are written as code."""
    areas = r"(?:megatron/trainer|moe_ext|moe_app|tools|tests|examples|docs|benchmarks)"
    text = document.read_text("utf-8")
    named = re.findall(rf"(?<![\w/.]){areas}/[\w./-]*\w\.(?:py|md|yaml|sh)\b", text)
    named += re.findall(rf"`({areas}/[\w./-]*/)`", text)
    missing = [name for name in named if not (REPO / name).exists()]
    tests = re.findall(r"`(test_\w+\.py)`", text)
    return missing + [name for name in tests if not any((REPO / "tests").rglob(name))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_and_paths_exist(document: Path) -> None:
    assert broken_links(document) == []
    assert missing_paths(document) == []


def test_broken_link_and_path_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "[a](gone.md#x) [b](https://a.b/c) [c](a.md) `tools/gone.py` moe_ext/no.py"
        " `test_repository.py` `test_gone.py`"
    )
    assert broken_links(document) == ["gone.md"]
    assert missing_paths(document) == ["tools/gone.py", "moe_ext/no.py", "test_gone.py"]


def written_records() -> list[Record]:
    """Build the records of a step and of an evaluation, like the training loop."""
    metrics = {"moe": RouterMetrics(2, 4), "moa": RouterMetrics(2, 4)}
    for kind, layer in itertools.product(metrics, (1, 2)):
        metrics[kind].record(
            layer,
            load_balancing=torch.tensor(1.0),
            z_sum=torch.tensor(8.0),
            entropy_sum=torch.tensor(4.0),
            tokens_per_expert=torch.tensor([4, 4, 0, 0]),
            num_tokens=4,
            group_size=1,
        )
    data = SimpleNamespace(
        consumed_samples=8, consumed_per_source=lambda: {"code": 8}, phase="stable"
    )
    state: Any = SimpleNamespace(
        cfg=RunConfig(),
        ctx=SimpleNamespace(world_size=1),
        metrics=RouterHealth(metrics),
        train_data=data,
        validation={"code": None},
        flops_per_token=1.0,
        iteration=1,
    )
    result = StepResult(
        loss=2.0,
        metrics=dict.fromkeys(OBJECTIVE_KEYS, 2.0),
        grad_norm=1.0,
        learning_rate=0.1,
        global_batch_size=8,
    )
    straggler = {"straggler_rank": 0, "straggler_ratio": 1.0}
    return [
        loop.step_record(state, result, samples_per_second=8.0, skipped=0) | straggler,
        loop.evaluation_record(state, "lm_loss", {"code": {"lm_loss": 2.0, "other": 1.0}})
        | score_record({}, {}, seconds=1.0),
    ]


def test_run_directory_document_explains_every_key() -> None:
    text = (REPO / "docs/run_directory.md").read_text("utf-8")
    records = written_records()
    keys = {key for record in records for key in record}
    assert {"lm_loss", "valid_loss", "z_loss", "layer_entropy", "model_tflops"} <= keys
    explained = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    assert keys - explained == set()
    # Every explained key exists in a record; run.json's table is another section.
    section = text.partition("## metrics.jsonl")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == keys


def test_glossary_has_every_letter_that_shapes_use() -> None:
    text = (REPO / "docs/glossary.md").read_text("utf-8")
    known = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|[^|]*\|", text, re.MULTILINE))))
    assert set(LETTERS) <= known
    for short in SHORT:
        assert f"\n| {short} |" in text
    used = set()
    for path in (REPO / "moe_ext").rglob("*.py"):
        for shape in re.findall(
            r"\[((?:\d?[a-z]{1,2}|\d)(?:, (?:\d?[a-z]{1,2}|\d))+)\]", path.read_text()
        ):
            used |= {re.sub(r"^\d+", "", size) for size in shape.split(", ")} - {""}
    assert {"t", "e", "hn"} <= used
    assert used <= known


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is not known")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    return [REPO / name for name in listing.split("\0") if name and (REPO / name).exists()]


def broken_conventions(path: Path) -> list[str]:
    content = path.read_bytes()
    found = [f"{len(content)} bytes, at most {MAX_BYTES}"] if len(content) > MAX_BYTES else []
    if b"PRIVATE KEY" + b"-----" in content:
        found.append("holds a private key")
    if b"\0" not in content and content:
        if not content.endswith(b"\n") or content.endswith(b"\n\n"):
            found.append("does not end with one newline")
        if re.search(rb"[ \t]+$", content, re.MULTILINE) and path.suffix != ".md":
            found.append("has blanks at the end of a line")
        if b"\r\n" in content:
            found.append("has Windows line ends")
    return found


def test_every_tracked_file_follows_the_conventions() -> None:
    found = {relative(path): broken_conventions(path) for path in tracked_files()}
    assert len(found) > 50
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"x" * MAX_BYTES + b"\n", "500001 bytes, at most 500000"),
        (b"x = 1", "does not end with one newline"),
        (b"x = 1\n\n", "does not end with one newline"),
        (b"x = 1 \n", "has blanks at the end of a line"),
        (b"x = 1\r\n", "has Windows line ends"),
        (b"-----BEGIN RSA " + b"PRIVATE KEY" + b"-----\n", "holds a private key"),
    ],
)
def test_broken_convention_is_found(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(content)
    assert problem in broken_conventions(path)
