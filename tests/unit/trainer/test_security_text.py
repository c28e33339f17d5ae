"""Texts of somebody else: recipes, run.json, wandb ids, and names that end up in messages."""

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron.trainer.checkpoint import FoundCheckpoint, layout
from megatron.trainer.checkpoint.saved_run import read_run, saved_config
from megatron.trainer.config.recipe import read_recipe, schema_of
from megatron.trainer.config.schema import LoggingConfig, RunConfig
from megatron.trainer.data.phase_records import read_records
from megatron.trainer.errors import CheckpointError, ConfigError, DataError, printable
from megatron.trainer.hooks import writers
from megatron.trainer.optim.scheduler import check_schedule
from megatron.trainer.runtime.launch import run_main
from megatron.trainer.runtime.log import configure_logging

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + depth)}: &{chr(98 + depth)} [{','.join([f'*{chr(97 + depth)}'] * 9)}]\n"
    for depth in range(9)
)
"""Nine to the power of ten words in 700 bytes."""

RECIPES: dict[str, tuple[str, str]] = {
    "python object": (
        "wandb_name: !!python/object/apply:os.mkdir [CANARY]\n",
        "has the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir'; recipes take no tags",
    ),
    "python name": ("lr: !!python/name:os.system ''\n", "recipes take no tags"),
    "own tag": ("lr: !cmd 1\n", "has the tag '!cmd'"),
    "tag on the whole": ("!!python/object/new:os.mkdir {args: [CANARY]}\n", "unknown key 'args'"),
    "binary": ("wandb_name: !!binary aGk=\n", "recipes take no tags"),
    "aliases": (BOMB, "recipes take no aliases: write *a out"),
    "alias of a scalar": ("lr: &x 1\nmin_lr: *x\n", "recipes take no aliases: write *x out"),
    "a value in itself": ("data_path: &x [*x]\n", "recipes take no aliases: write *x out"),
    "merge key": ("<<: {lr: 1}\n", "unknown key '<<'"),
    "deep nesting": ("lr: " + "[" * 10_000, "is not valid YAML"),
    "second document": ("lr: 1\n---\nlr: 2\n", "expected a single document"),
    "huge number": ("train_iters: " + "9" * 5000 + "\n", "train_iters' in"),
    "control characters": ("lr: \x00\n", "is not valid YAML"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused_and_nothing_in_it_runs(name: str, tmp_path: Path) -> None:
    text, told = RECIPES[name]
    canary, path = tmp_path / "canary", tmp_path / "recipe.yaml"
    path.write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(ConfigError) as caught:
        read_recipe(str(path), schema_of(RunConfig))
    assert told in str(caught.value)
    assert not canary.exists()


def test_the_recipe_payload_is_live(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = RECIPES["python object"][0].replace("CANARY", str(canary))
    yaml.unsafe_load(text)
    assert canary.exists()


def test_a_recipe_of_any_size_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole; takes no room on the disk
    with pytest.raises(ConfigError, match="it has more than 4,194,304 bytes"):
        read_recipe(str(path), schema_of(RunConfig))


def test_anchors_that_nothing_refers_to_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: &x 1\n")
    assert read_recipe(str(path), schema_of(RunConfig)) == ({"lr": 1.0}, None)


@pytest.fixture
def found(tmp_path: Path) -> FoundCheckpoint:
    return FoundCheckpoint(path=tmp_path, iteration=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: !!python/object/apply:os.mkdir [CANARY]\n", "could not determine a constructor"),
        (BOMB, "recipes take no aliases"),
        ("a: " + "[" * 10_000, "recursion"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("a: 2001-99-99", "month must be"),
        ("- a\n", "holds list, not a mapping"),
        ("", "holds NoneType, not a mapping"),
    ],
)
def test_a_hostile_config_in_a_checkpoint_is_refused(
    text: str, told: str, found: FoundCheckpoint
) -> None:
    canary = found.path / "canary"
    (found.path / "config.yaml").write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(CheckpointError, match=told):
        saved_config(found)
    assert not canary.exists()


RUN: dict[str, Any] = {
    "data": {},
    "iteration": 3,
    "layout": {},
    "optimizer_steps": 3,
    "schedule": {},
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"iteration": "3"}, "has iteration '3'; it must be a number of steps"),
        ({"iteration": -1}, "has iteration -1"),
        ({"iteration": True}, "has iteration True"),
        ({"iteration": 1 << 63}, "has iteration 9223372036854775808"),
        ({"iteration": 1e3}, "has iteration 1000.0"),
        ({"optimizer_steps": None}, "has optimizer_steps None"),
        ({"data": []}, r"has data \[\]; it must be an object"),
        ({"layout": "x"}, "has layout 'x'"),
        ({"schedule": 1}, "has schedule 1"),
    ],
)
def test_run_json_of_other_types_is_refused(
    changes: dict[str, Any], told: str, found: FoundCheckpoint
) -> None:
    (found.path / "run.json").write_text(json.dumps(RUN))
    assert read_run(found) == RUN
    (found.path / "run.json").write_text(json.dumps({**RUN, **changes}))
    with pytest.raises(CheckpointError, match=told):
        read_run(found)


@pytest.mark.parametrize("text", ["", "{", "[" * 10_000, '{"a": ' + "9" * 5000 + "}"])
def test_run_json_that_is_no_json_is_refused(text: str, found: FoundCheckpoint) -> None:
    (found.path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is not JSON"):
        read_run(found)


PHASE = {
    "name": None,
    "inherited": False,
    "seed": 1,
    "num_samples": None,
    "sources": ["a"],
    "weights": [1.0],
    "windows_per_epoch": [10],
    "consumed": [4],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ["a"]},
        {"num_samples": "4"},
        {"consumed": [1 << 70]},
        {"consumed": [-4]},
        {"sources": [["a"]]},
        {"seed": None},
    ],
)
def test_a_data_state_of_other_types_is_refused(changes: dict[str, Any]) -> None:
    assert read_records({"phases": [PHASE], "consumed_samples": 4}) == [PHASE]
    phase: dict[str, Any] = {**PHASE, **changes}
    with pytest.raises(DataError, match="each phase must name sources"):
        read_records({"phases": [phase], "consumed_samples": sum(phase["consumed"])})


@pytest.mark.parametrize("saved", [{}, {"lr_decay_iters": "8", "lr_wsd_decay_iters": None}])
def test_a_schedule_of_other_types_is_another_schedule(saved: dict[str, Any]) -> None:
    wanted = {"lr_decay_style": "WSD", "lr_decay_iters": 8, "lr_wsd_decay_iters": 2}
    with pytest.raises(CheckpointError, match="another learning-rate schedule"):
        check_schedule(wanted, {"lr_decay_style": "WSD", **saved}, iteration=1, override=False)


def wandb_with(record: dict[str, Any]) -> Any:
    def init(**given: Any) -> Any:
        record.update(given)
        return SimpleNamespace(finish=lambda: None)

    return SimpleNamespace(init=init, errors=SimpleNamespace(Error=RuntimeError))


@pytest.mark.parametrize(
    "text", ["../../other", "a/b", "", "a b", "x" * 65, "x" * 1000, "\x1b[2J", "réseau"]
)
def test_a_hostile_wandb_id_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", wandb_with(given))
    (tmp_path / "wandb_run_id").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="wandb_run_id"):
        writers.WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})
    assert given == {}


def test_the_wandb_id_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", wandb_with(given))
    for _ in range(2):
        writers.WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})
        assert given["id"] == (tmp_path / "wandb_run_id").read_text().strip()


def test_a_pipe_in_place_of_the_tracker_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / layout.TRACKER_NAME)
    told = layout.read_tracker(tmp_path)
    assert told == f"{layout.TRACKER_NAME} cannot be read: it is not a regular file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc é 漢", "a\tb\nc é 漢"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08\x7f\x9b", "a\\rb\\x08\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
    ],
)
def test_control_characters_are_spelled_out(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_names_out_of_files_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConfigError("tensor \x1b[2J of a file")

    assert run_main(fail) == 2
    assert capsys.readouterr().err == "ConfigError: tensor \\x1b[2J of a file\n"
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        configure_logging(0)
        logging.getLogger("any").warning("source %s", "\x1b[31mred")
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err.endswith("source \\x1b[31mred\n")
