"""Tests loading: precedence, strictness, and that a written config reads back as itself."""

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.config.cli import dump_config, flatten, load_config
from megatron.trainer.config.recipe import is_recipe_only, read_recipe, schema_of
from megatron.trainer.config.schema import ParallelConfig, RunConfig
from megatron.trainer.errors import ConfigError
from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Holds every group, like the config of an application."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)


PRESETS = {"small": {"num_layers": 2, "hidden_size": 64}, "large": {"num_layers": 48}}


def load(*argv: str, quiet: bool = False) -> PretrainConfig:
    return load_config(
        PretrainConfig,
        argv,
        prog="pretrain",
        description="Train a model.",
        presets=PRESETS,
        quiet=quiet,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    return str(caught.value)


# --- precedence ---------------------------------------------------------------------------------


def test_no_arguments_give_the_dataclass_defaults() -> None:
    assert load() == PretrainConfig()


def test_preset_overrides_defaults_recipe_overrides_preset_and_flags_override_all(
    recipe: Callable[[str], str],
) -> None:
    path = recipe("hidden_size: 96\nvocab_size: 300\n")
    model = load("--preset", "small", "--vocab-size", "200", "--config", path).model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (2, 96, 200)
    assert model.num_attention_heads == MoEModelConfig().num_attention_heads


def test_a_flag_equal_to_the_default_still_overrides_the_recipe(
    recipe: Callable[[str], str],
) -> None:
    assert MoEModelConfig().num_layers == 4
    path = recipe("num_layers: 2\nbf16: true\nkv_channels: 8\n")
    cfg = load("--config", path, "--num-layers", "4", "--no-bf16", "--kv-channels", "None")
    assert (cfg.model.num_layers, cfg.training.bf16, cfg.model.kv_channels) == (4, False, None)


def test_a_recipe_names_its_preset_and_the_flag_names_another(
    recipe: Callable[[str], str],
) -> None:
    path = recipe("preset: small\nhidden_size: 32\n")
    assert load("--config", path).model.num_layers == 2
    model = load("--config", path, "--preset", "large").model
    assert (model.num_layers, model.hidden_size) == (48, 32)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("joined", [True, False])
def test_config_flag_is_read_at_any_position_in_both_spellings(
    recipe: Callable[[str], str], position: int, joined: bool
) -> None:
    path = recipe("seq_length: 77\n")
    argv = ["--num-layers", "6", "--seed", "5"]
    argv[position:position] = [f"--config={path}"] if joined else ["--config", path]
    cfg = load(*argv)
    assert (cfg.training.seq_length, cfg.model.num_layers, cfg.training.seed) == (77, 6, 5)


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--num-layers", "7"], "num_layers", 7),
        (["--num_layers", "7"], "num_layers", 7),
        (["--num_layers=7"], "num_layers", 7),
        (["--num-layers", "7", "--num-layers", "8"], "num_layers", 8),
        (["--lr", "4e-4"], "lr", 4.0e-4),
        (["--lr", "1"], "lr", 1.0),
        (["--bf16"], "bf16", True),
        (["--no-tensorboard"], "tensorboard", False),
        (["--no_tensorboard"], "tensorboard", False),
        (["--sequence-parallel"], "sequence_parallel", True),
        (["--no-sequence-parallel"], "sequence_parallel", False),
        (["--num-experts", "None"], "num_experts", None),
        (["--kv-channels", "4"], "kv_channels", 4),
        (["--save", "runs/a"], "save", "runs/a"),
        (["--save", "None"], "save", None),
        (["--recompute-granularity", "full"], "recompute_granularity", "full"),
        (["--recompute-granularity", "None"], "recompute_granularity", None),
        (["--recompute-method", "block"], "recompute_method", "block"),
        (["--data-path", "0.7", "A", "0.3", "B"], "data_path", ("0.7", "A", "0.3", "B")),
        (["--data-path"], "data_path", ()),
        (["--recompute-modules", "moe", "layernorm"], "recompute_modules", ("moe", "layernorm")),
    ],
)
def test_flags_of_every_kind_parse(argv: list[str], name: str, expected: object) -> None:
    value = flatten(load(*argv))[name]
    assert value == expected
    assert type(value) is type(expected)


def test_every_field_has_a_flag() -> None:
    strategies = {
        bool: lambda name, value: [f"--{'no-' if value else ''}{name}"],
        int: lambda name, value: [f"--{name}", str(value + 3)],
        float: lambda name, value: [f"--{name}", str(value + 0.5)],
        str: lambda name, value: [f"--{name}", value + "x"],
        tuple[str, ...]: lambda name, value: [f"--{name}", "p", "q"],
        tuple[int, ...]: lambda name, value: [f"--{name}", "3", "4"],
    }
    defaults = flatten(PretrainConfig())
    argv = []
    for name, place in schema_of(PretrainConfig).items():
        hint = _inner(place.hint)
        if is_recipe_only(hint):
            continue
        if typing.get_origin(hint) is Literal:
            argv += [f"--{name}", str(typing.get_args(hint)[-1])]
            continue
        value = defaults[name]
        argv += strategies[hint](name, hint() if value is None else value)
    changed = flatten(load(*argv))
    same = [name for name in defaults if changed[name] == defaults[name]]
    # A choice whose last value is the default, and fields that only a recipe can set.
    hints = [schema_of(PretrainConfig)[name].hint for name in same]
    assert all(is_recipe_only(hint) or typing.get_origin(hint) is Literal for hint in hints)


def test_an_unknown_flag_exits_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--num-layer", "4")
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "--num-layer" in shown.err and "--num-layers INT" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-layer", "4"],
        ["--num-layers", "four"],
        ["--recompute-method", "sine"],
        ["--config"],
        ["--config", "--bf16"],
        ["--print-config=3"],
        ["stray"],
    ],
)
def test_wrong_flags_exit_2_and_quiet_prints_nothing(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as loud:
        load(*argv)
    assert capfd.readouterr().err != ""
    with pytest.raises(SystemExit) as silent:
        load(*argv, quiet=True)
    assert (loud.value.code, silent.value.code) == (2, 2)
    assert capfd.readouterr() == ("", "")


def test_help_shows_every_flag_its_docstring_and_the_three_that_load_adds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    schema = schema_of(PretrainConfig)
    flagged = [name for name in schema if not is_recipe_only(schema[name].hint)]
    for name in (*flagged, "config", "preset", "print_config"):
        assert re.search(rf"--{name.replace('_', '-')}\b", shown), name
    assert "--sequence-parallel, --no-sequence-parallel" in shown
    assert "Transformer layers. (default: 4)" in shown
    assert "small, large" in shown
    for group in dataclasses.fields(PretrainConfig):
        assert f"{group.name} options" in shown


def test_print_config_prints_the_resolved_recipe_and_exits_0(
    recipe: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe("preset: small\nseq_length: 64\n")
    argv = ("--config", path, "--lr", "1e-3")
    with pytest.raises(SystemExit) as caught:
        load(*argv, "--print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load("--config", recipe(printed)) == load("--config", recipe(printed), "--lr", "1e-3")
    assert yaml.safe_load(printed)["lr"] == 1.0e-3
    assert yaml.safe_load(printed)["num_layers"] == 2
    with pytest.raises(SystemExit) as caught:
        load("--print-config", quiet=True)
    assert caught.value.code == 0
    assert capsys.readouterr().out == ""


# --- choosing a recipe and a preset -------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--config", "--preset"])
def test_a_second_recipe_or_preset_is_refused(flag: str) -> None:
    assert refused(flag, "a", f"{flag}=b") == (
        f"{flag} is given 2 times (b, a); it takes one value, give it once"
    )


def test_an_unknown_preset_is_refused(recipe: Callable[[str], str]) -> None:
    assert refused("--config", recipe("preset: smal\n")) == (
        "unknown preset 'smal'; did you mean 'small'?; the presets are: small, large"
    )
    assert refused("--preset", "zzz") == "unknown preset 'zzz'; the presets are: small, large"


# --- writing ------------------------------------------------------------------------------------


def _inner(hint: Any) -> Any:
    """Return X of `X | None`."""
    members = [each for each in typing.get_args(hint) if each is not type(None)]
    return members[0] if type(None) in typing.get_args(hint) else hint


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if type(None) in typing.get_args(hint):
        return st.none() | _values(_inner(hint))
    text = st.sampled_from(
        ["null", "~", "", "yes", "1e3", "0.7", "a: b", "- a", "#", "a\x85 \u2028b\r"]
    )
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False),
        str: text | st.text(),
    }
    if is_recipe_only(hint):
        record = typing.get_args(hint)[0]
        fields = {name: _values(kind) for name, kind in typing.get_type_hints(record).items()}
        return st.lists(st.builds(record, **fields), max_size=2).map(tuple)
    if typing.get_origin(hint) is tuple:
        return st.lists(kinds[typing.get_args(hint)[0]], max_size=3).map(tuple)
    return kinds[hint]


@st.composite
def configs(draw: st.DrawFn) -> PretrainConfig:
    groups = {}
    for group in dataclasses.fields(PretrainConfig):
        cls = typing.get_type_hints(PretrainConfig)[group.name]
        hints = typing.get_type_hints(cls)
        names = [each.name for each in dataclasses.fields(cls)]
        groups[group.name] = cls(**{name: draw(_values(hints[name])) for name in names})
    return PretrainConfig(**groups)


@given(configs())
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
def test_a_written_config_loads_as_itself(
    tmp_path_factory: pytest.TempPathFactory, cfg: PretrainConfig
) -> None:
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(cfg), encoding="utf-8")
    assert load("--config", str(path)) == cfg


def test_a_written_config_has_every_field_and_a_line_per_group() -> None:
    text = dump_config(load("--data-path", "0.7", "a b", "0.3", "c"))
    assert list(yaml.safe_load(text)) == list(schema_of(PretrainConfig))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments[0] == "# parallel: Sets how the model and the batch are sharded over ranks."
    assert len(comments) == len(dataclasses.fields(PretrainConfig))
    # Other YAML readers see the same numbers: YAML 1.1 reads 4e-05 as a string.
    assert yaml.safe_load(text)["min_lr"] == 4.0e-5
    assert yaml.safe_load(text)["data_path"] == ["0.7", "a b", "0.3", "c"]


def test_flatten_gives_every_field_once() -> None:
    cfg = PretrainConfig()
    expected = {
        name: value for group in dataclasses.asdict(cfg).values() for name, value in group.items()
    }
    assert flatten(cfg) == expected


# --- bugs of the application --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Twin:
    seq_length: int = 1


@dataclass(frozen=True, kw_only=True)
class Reserved:
    preset: str = ""


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    table: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Twin, "the name 'seq_length' of group 'extra' is taken by 'training'"),
        (Reserved, "the name 'preset' of group 'extra' is taken by 'load_config'"),
        (Unreadable, "a field has the type dict[str, int], which flags and recipes cannot set"),
        (int, "Odd.extra must be a dataclass of fields"),
    ],
)
def test_a_config_class_that_cannot_be_flat_is_an_internal_error(group: type, message: str) -> None:
    odd = dataclasses.make_dataclass(
        "Odd", [("extra", group, field(default_factory=group))], bases=(RunConfig,), frozen=True
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        load_config(odd, [], prog="p", description="d")


def test_a_preset_of_unknown_fields_is_an_internal_error() -> None:
    with pytest.raises(TypeError, match=re.escape("sets fields that do not exist: ['nope']")):
        load_config(
            PretrainConfig,
            ["--preset", "bad"],
            prog="p",
            description="d",
            presets={"bad": {"nope": 1}},
        )


def test_load_config_serves_any_class_of_groups(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Small:
        parallel: ParallelConfig = field(default_factory=ParallelConfig)

    path = tmp_path / "r.yaml"
    path.write_text("device: cpu\n", encoding="utf-8")
    argv = ["--config", str(path), "--threads-per-rank", "2"]
    cfg = load_config(Small, argv, prog="p", description="d")
    assert cfg == Small(parallel=ParallelConfig(device="cpu", threads_per_rank=2))
    values, preset = read_recipe(str(path), schema_of(Small))
    assert (values, preset) == ({"device": "cpu"}, None)
