"""Tests that recipe values convert to the type of their field, and that all else is rejected."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron.trainer.config.recipe import read_recipe, schema_of
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.errors import ConfigError
from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Holds every group, like the config of an application."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def read(path: str) -> tuple[dict[str, object], str | None]:
    return read_recipe(path, schema_of(PretrainConfig))


def refused(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_recipe_changes_nothing(recipe: Callable[[str], str], text: str) -> None:
    assert read(recipe(text)) == ({}, None)


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("num_layers: 7  # remark", "num_layers", 7),
        ("num-layers: 7", "num_layers", 7),
        ("train_iters: 1_000", "train_iters", 1000),
        ("lr: 4.0e-4", "lr", 4.0e-4),
        ("lr: 4e-4", "lr", 4.0e-4),
        ("lr: 1", "lr", 1.0),
        ("bf16: true", "bf16", True),
        ("sequence_parallel: false", "sequence_parallel", False),
        ("sequence_parallel: null", "sequence_parallel", None),
        ("num_experts:", "num_experts", None),
        ("save: None", "save", None),
        ("save: 'None'", "save", "None"),
        ("wandb_name: 2024-09-03", "wandb_name", "2024-09-03"),
        ("wandb_name: 007", "wandb_name", "007"),
        ("wandb_name: no", "wandb_name", "no"),
        ("split: 99,1", "split", "99,1"),
        ("split: 99:1", "split", "99:1"),
        ("recompute_granularity: selective", "recompute_granularity", "selective"),
        ("data_path: [0.70, data/a, 0.30, 1e3]", "data_path", ("0.70", "data/a", "0.30", "1e3")),
        ("data_path:\n  - data/a", "data_path", ("data/a",)),
        ("data_path: []", "data_path", ()),
    ],
)
def test_recipe_values_of_every_kind_read_as_their_field(
    recipe: Callable[[str], str], line: str, name: str, expected: object
) -> None:
    values, _ = read(recipe(line + "\n"))
    value = values.pop(name)
    assert values == {}
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nnum_layer: 4\n",
            "unknown key 'num_layer' in FILE:2; did you mean 'num_layers'?",
        ),
        ("model:\n  num_layers: 4\n", "unknown key 'model' in FILE:1; see --help for all keys"),
        ("presets: small\n", "unknown key 'presets' in FILE:1; did you mean 'preset'?"),
        ("3: 4\n", "unknown key '3' in FILE:1; see --help for all keys"),
        (
            "num_layers: 4\nseed: 1\nnum-layers: 6\n",
            "key 'num-layers' is set a second time in FILE:3; keep one of them",
        ),
        (
            "preset: small\npreset: large\n",
            "key 'preset' is set a second time in FILE:2; keep one of them",
        ),
        ("num_layers: four\n", "key 'num_layers' in FILE:1 must be an integer, not 'four'"),
        ("num_layers: 4.0\n", "key 'num_layers' in FILE:1 must be an integer, not '4.0'"),
        ("num_layers: true\n", "key 'num_layers' in FILE:1 must be an integer, not 'true'"),
        (
            "num_layers: '4'\n",
            "key 'num_layers' in FILE:1 must be an integer, not the quoted string '4'",
        ),
        ("num_layers: null\n", "key 'num_layers' in FILE:1 must be an integer, not null"),
        ("num_layers: [4]\n", "key 'num_layers' in FILE:1 must be an integer, not a list"),
        (
            "num_experts: many\n",
            "key 'num_experts' in FILE:1 must be an integer, or null, not 'many'",
        ),
        ("lr: {peak: 1}\n", "key 'lr' in FILE:1 must be a number, not a mapping"),
        ("lr: fast\n", "key 'lr' in FILE:1 must be a number, not 'fast'"),
        ("bf16: yes\n", "key 'bf16' in FILE:1 must be true or false, not 'yes'"),
        ("bf16: 1\n", "key 'bf16' in FILE:1 must be true or false, not '1'"),
        ("split: null\n", "key 'split' in FILE:1 must be a string, not null"),
        (
            "recompute_method: all\n",
            "key 'recompute_method' in FILE:1 must be one of uniform, block, not 'all'",
        ),
        (
            "data_path: data/a\n",
            "key 'data_path' in FILE:1 must be a list, each entry a string, not 'data/a'",
        ),
        ("data_path: [null]\n", "key 'data_path' in FILE:1 must be a string, not null"),
        (
            "save: !!python/object/apply:os.getcwd []\n",
            "key 'save' in FILE:1 has the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd';"
            " recipes take no tags, remove it",
        ),
        (
            "- num_layers\n",
            "the recipe 'FILE' must be a mapping, one `key: value` a line, not a list",
        ),
        (
            "words\n",
            "the recipe 'FILE' must be a mapping, one `key: value` a line, not 'words'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place(
    recipe: Callable[[str], str], text: str, message: str
) -> None:
    path = recipe(text)
    assert refused(path) == message.replace("FILE", path)


@pytest.mark.parametrize("text", ["a: [1\n", "a: b: c\n", "a: *nowhere\n", "a: 1\n---\nb: 1\n"])
def test_broken_yaml_is_refused_with_its_line(recipe: Callable[[str], str], text: str) -> None:
    path = recipe(text)
    message = refused(path)
    assert message.startswith(f"the recipe '{path}' is not valid YAML: ")
    assert "line " in message


def test_deeply_nested_yaml_is_refused(recipe: Callable[[str], str]) -> None:
    message = refused(recipe("a: " + "[" * 10_000))
    assert "is not valid YAML" in message


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert refused(path) == (
        f"cannot read the recipe '{path}': No such file or directory; --config takes a YAML file"
    )


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe")
    assert refused(str(path)).startswith(f"the recipe '{path}' is not UTF-8 text: ")
