"""Builds a run config from defaults, a preset, a YAML recipe and flags; later sources win."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from megatron.trainer.config.near_names import did_you_mean, near_names
from megatron.trainer.config.recipe import (
    FieldPlace,
    dump_config,
    flatten,
    is_recipe_only,
    read_recipe,
    schema_of,
    strip_optional,
)
from megatron.trainer.errors import ConfigError

__all__ = ["dump_config", "flatten", "load_config", "with_overrides"]

T = TypeVar("T")


def load_config(
    config_class: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Mapping[str, object]] = types.MappingProxyType({}),
    resolve: Callable[[T, list[frozenset[str]]], T] | None = None,
    base: Mapping[str, object] = types.MappingProxyType({}),
    ignored: Collection[str] = (),
    quiet: bool = False,
) -> T:
    """Build a run config with the precedence defaults < base < preset < recipe < flags.

    Three flags belong to no group: `--config FILE` names the recipe, `--preset NAME` the preset
    (a recipe may name it too, as `preset:`; the flag wins), and `--print-config` prints the result
    as a recipe.

    Args:
        config_class: a frozen dataclass of groups.
        argv: the command line without the program's name.
        prog: the program's name in help and usage messages.
        description: what the program does, for --help.
        presets: named sets of field values.
        resolve: returns the config with alternative spellings of a setting reduced to one, given
            the names that preset, recipe and flags each set (None counts as not set).
        base: field values that stand for the defaults.
        ignored: keys of a recipe that are passed over: settings of another kind of run.
        quiet: print nothing; for ranks other than 0.

    Raises:
        ConfigError: the recipe is invalid, or no such recipe or preset exists.
        SystemExit: 0 after --help and --print-config, 2 after a wrong flag.
    """
    schema = schema_of(config_class)
    recipe_path = _single_value(argv, "--config")
    recipe, named = (
        ({}, None) if recipe_path is None else read_recipe(recipe_path, schema, ignored=ignored)
    )
    flagged = _single_value(argv, "--preset")
    preset = named if flagged is None else flagged
    named_values = _preset_values(preset, presets, schema)
    values = {**base, **named_values, **recipe}
    with contextlib.ExitStack() as stack:
        if quiet:
            # tyro prints some errors regardless of its console_outputs.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            cfg, is_print_only = _parse_flags(
                _with_values(config_class(), schema, values),
                argv,
                prog=prog,
                description=description,
                presets=tuple(presets),
            )
        except SystemExit as end:
            if end.code:
                sys.stderr.write(_nearest_flags(argv, schema))
            raise
        if resolve is not None:
            layers = (named_values, recipe, _flagged(argv, schema))
            given = {name for name, value in flatten(cfg).items() if value is not None}
            cfg = resolve(cfg, [frozenset(given.intersection(layer)) for layer in layers])
        if is_print_only:
            sys.stdout.write(dump_config(cfg))
            raise SystemExit(0)
    return cfg


def _flagged(argv: Sequence[str], schema: Mapping[str, FieldPlace]) -> set[str]:
    """Return the names of the fields that flags set."""
    names = {
        token.partition("=")[0].removeprefix("--").replace("-", "_")
        for token in argv
        if token.startswith("--")
    }
    return (names | {name.removeprefix("no_") for name in names}) & schema.keys()


def _nearest_flags(argv: Sequence[str], schema: Mapping[str, FieldPlace]) -> str:
    """Suggest a known flag for each unknown one, a line each; tyro covers only some of them."""
    lines = []
    known = (*schema, "config", "preset", "print_config")
    for token in argv:
        flag = token.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            continue
        if name in schema and is_recipe_only(schema[name].hint):
            lines.append(f"{flag} is not a flag: {name} can be set in a recipe only\n")
        elif not {name, name.removeprefix("no_")} & {*known, "help"}:
            near = " or ".join(f"--{each.replace('_', '-')}" for each in near_names(name, known))
            lines += [f"{flag}: did you mean {near}?\n"] if near else []
    return "".join(lines)


def _single_value(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag that is needed before the others can be parsed.

    A flag without a value is left for tyro to report.
    """
    found = [token.partition("=")[2] for token in argv if token.startswith(f"{flag}=")]
    for token, following in itertools.pairwise(argv):
        if token == flag and not following.startswith("--"):
            found.append(following)
    if len(found) > 1:
        raise ConfigError(
            f"{flag} is given {len(found)} times ({', '.join(found)}); it takes one value, give it"
            " once"
        )
    return found[0] if found else None


def _preset_values(
    name: str | None, presets: Mapping[str, Mapping[str, object]], schema: Mapping[str, FieldPlace]
) -> dict[str, object]:
    if name is None:
        return {}
    if name not in presets:
        raise ConfigError(
            f"unknown preset {name!r}{did_you_mean(name, presets)}; the presets are:"
            f" {', '.join(presets) or 'none'}"
        )
    unknown = presets[name].keys() - schema.keys()
    if unknown:
        raise TypeError(f"preset {name!r} sets fields that do not exist: {sorted(unknown)}")
    return dict(presets[name])


def with_overrides(
    cfg: T,
    values: Mapping[str, object],
    *,
    resolve: Callable[[T, list[frozenset[str]]], T] | None = None,
) -> T:
    """Return a config with some fields replaced, as flags replace those of a recipe.

    Args:
        cfg: complete, as `load_config` returns it.
        values: of the fields' types, by name.
        resolve: as in `load_config`.
    """
    cfg = _with_values(cfg, schema_of(type(cfg)), values)
    if resolve is None:
        return cfg
    return resolve(cfg, [frozenset(name for name, value in values.items() if value is not None)])


def _with_values(cfg: T, schema: Mapping[str, FieldPlace], values: Mapping[str, object]) -> T:
    """Return a config with some fields replaced."""
    changes: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        changes.setdefault(schema[name].group, {})[name] = value
    groups = {
        group: dataclasses.replace(getattr(cfg, group), **fields)
        for group, fields in changes.items()
    }
    return typing.cast(T, dataclasses.replace(typing.cast(Any, cfg), **groups))


def _parse_flags(
    cfg: T, argv: Sequence[str], *, prog: str, description: str, presets: tuple[str, ...]
) -> tuple[T, bool]:
    """Override `cfg` with flags; also return whether --print-config was given.

    To describe hundreds of fields takes most of the time. So those that `argv` names are parsed
    alone, and all of them only for the help and for messages about what is wrong.
    """
    sources = _sources_class(presets)
    run = functools.partial(
        tyro.cli,
        args=list(argv),
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    schema = schema_of(type(cfg))
    named = [
        name
        for name in _flagged(argv, schema)
        if name in schema and not is_recipe_only(schema[name].hint)
    ]
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            parsed: Any = run(_named_fields(cfg, sources, named))
    except SystemExit:
        parsed = run(_all_fields(cfg, sources))
        groups = {
            group.name: _copy_fields(getattr(parsed, group.name), type(getattr(cfg, group.name)))
            for group in dataclasses.fields(typing.cast(Any, cfg))
        }
        return dataclasses.replace(typing.cast(Any, cfg), **groups), parsed.recipe.print_config
    values = {name: getattr(parsed, name) for name in named}
    return _with_values(cfg, schema, values), parsed.print_config


def _named_fields(cfg: Any, sources: type, names: Sequence[str]) -> type:
    """Return a class of these fields and the sources, with the values of `cfg` as defaults."""
    fields: list[tuple[str, Any, Any]] = []
    for name, place in schema_of(type(cfg)).items():
        if name in names:
            hint = _PAIR if strip_optional(place.hint) == (bool, True) else place.hint
            default = getattr(getattr(cfg, place.group), name)
            fields.append((name, hint, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("NamedFields", fields, bases=(sources,), frozen=True)


def _all_fields(cfg: Any, sources: type) -> type:
    """Return a class of all groups, whose fields' values in `cfg` are the defaults."""
    members: list[tuple[str, Any, Any]] = [("recipe", sources, sources())]
    for group in dataclasses.fields(cfg):
        default = _for_flags(getattr(cfg, group.name))
        members.append((group.name, type(default), default))
    return dataclasses.make_dataclass(
        "CommandLine",
        [
            # Without the help, tyro would look for each group in the source of this class.
            (name, Annotated[kind, tyro.conf.arg(help=inspect.getdoc(kind))], default)
            for name, kind, default in members
        ],
        frozen=True,
    )


@functools.cache
def _sources_class(presets: tuple[str, ...]) -> type:
    """Build the group of flags that name the sources of the other values."""
    named = f"Named settings that the recipe and flags override: {', '.join(presets) or 'none'}."
    return dataclasses.make_dataclass(
        "Sources",
        [
            (
                "config",
                Annotated[
                    str | None,
                    tyro.conf.arg(metavar="FILE", help="YAML recipe; flags override its keys."),
                ],
                dataclasses.field(default=None),
            ),
            (
                "preset",
                Annotated[str | None, tyro.conf.arg(metavar="NAME", help=named)],
                dataclasses.field(default=None),
            ),
            (
                "print_config",
                Annotated[
                    bool,
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.arg(help="Print every setting as a recipe, and exit."),
                ],
                dataclasses.field(default=False),
            ),
        ],
        namespace={"__doc__": "Sources of the settings below: defaults < preset < recipe < flags."},
        frozen=True,
    )


_PAIR: Any = Annotated[bool | None, tyro.conf.DisallowNone]
"""Gives --x/--no-x to a `bool | None` field, as `bool` fields have them."""


def _for_flags(group: Any) -> Any:
    """Copy a group so that its fields are flags; fields that hold records give none."""
    cls = type(group)
    hints = typing.get_type_hints(cls)
    changed: list[tuple[str, Any, Any]] = [
        (field.name, _PAIR, dataclasses.field(default=None))
        for field in dataclasses.fields(cls)
        if strip_optional(hints[field.name]) == (bool, True)
    ]
    changed += [
        (name, Annotated[hint, tyro.conf.Suppress], dataclasses.field(default=()))
        for name, hint in hints.items()
        if is_recipe_only(hint)
    ]
    mirror = dataclasses.make_dataclass(
        cls.__name__,
        changed,
        bases=(cls,),
        namespace={"__doc__": cls.__doc__},
        frozen=True,
        kw_only=True,
    )
    return _copy_fields(group, mirror)


def _copy_fields(group: Any, cls: type) -> Any:
    return cls(**{field.name: getattr(group, field.name) for field in dataclasses.fields(group)})
