"""Reads and writes the YAML form of a run config.

A config is a frozen dataclass whose fields are groups (frozen dataclasses too). The groups' field
names are unique, so recipe keys and flags are flat. Fields are `bool`, `int`,
`float`, `str`, a `Literal` of strings, one of these or `None`, or `tuple[X, ...]` of one of these;
or `tuple[R, ...]` of a record R, a frozen dataclass of such fields, which flags cannot set.

A recipe is parsed to YAML nodes and never constructed into Python objects: a scalar is converted to
the type of its field, so `lr: 4e-4` is a number and `wandb_name: 2024-09-03` a string. Aliases are
rejected, because a short file of nested aliases can expand beyond any memory.
"""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.bounded_read import read_at_most

SOURCE_NAMES = ("config", "preset", "print_config")
"""Flags of `cli.load_config` itself; no field may have these names."""

_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_NULL = ("null", "Null", "NULL", "~", "", "None")
_SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_UNICODE_BREAKS = frozenset("\r\x85\u2028\u2029\ufeff")
_MOST_BYTES = 1 << 22
_IMPLICIT_TAGS = (
    "str",
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "seq",
    "map",
    "merge",
    "value",
)


@dataclasses.dataclass(frozen=True)
class FieldPlace:
    """Locates the field that a flag or recipe key sets."""

    group: str
    """Name of the group's field in the run config."""
    hint: Any
    """The field's type."""


def schema_of(config_class: type) -> Mapping[str, FieldPlace]:
    """Map each flag name to its field, in order.

    Raises:
        TypeError: the class is not made of groups with unique names and readable types; a bug of
            the application.
    """
    return typing.cast(Any, _read_schema)(config_class)  # to mypy, a class cannot be hashed


@functools.cache
def _read_schema(config_class: Any) -> Mapping[str, FieldPlace]:
    schema: dict[str, FieldPlace] = {}
    group_types = typing.get_type_hints(config_class)
    for group in dataclasses.fields(typing.cast(Any, config_class)):
        group_type = group_types[group.name]
        if not dataclasses.is_dataclass(group_type):
            raise TypeError(f"{config_class.__name__}.{group.name} must be a dataclass of fields")
        hints = typing.get_type_hints(group_type)
        for field in dataclasses.fields(group_type):
            if field.name in SOURCE_NAMES or field.name in schema:
                owner = schema[field.name].group if field.name in schema else "load_config"
                what = f"the name {field.name!r} of group {group.name!r} is taken by {owner!r}"
                raise TypeError(f"{what}; field names must be unique, because flags are flat")
            _expectation(hints[field.name])
            schema[field.name] = FieldPlace(group=group.name, hint=hints[field.name])
    return types.MappingProxyType(schema)


def flatten(cfg: object) -> dict[str, object]:
    """Return the value of every field by name, in the order of the groups; records as mappings."""
    return {
        name: _plain(getattr(getattr(cfg, field.group), name))
        for name, field in schema_of(type(cfg)).items()
    }


def _plain(value: object) -> object:
    """Convert records to mappings, and the tuples in them to lists."""
    if not isinstance(value, tuple) or not any(map(dataclasses.is_dataclass, value)):
        return value
    return tuple(
        {
            key: list(entry) if isinstance(entry, tuple) else entry
            for key, entry in dataclasses.asdict(record).items()
        }
        for record in value
    )


def dump_config(cfg: object) -> str:
    """Format a recipe that reproduces this config: every field, grouped, without a preset."""
    lines: list[str] = []
    group: str | None = None
    values = flatten(cfg)
    for name, field in schema_of(type(cfg)).items():
        if field.group != group:
            group = field.group
            doc = (type(getattr(cfg, group)).__doc__ or "").strip().partition("\n")[0]
            lines += ["", f"# {group}: {doc}"] if lines else [f"# {group}: {doc}"]
        value = values[name]
        plain = list(value) if isinstance(value, tuple) else value
        lines.append(
            yaml.dump(
                {name: plain},
                Dumper=_RecipeDumper,
                default_flow_style=None if isinstance(plain, list) else False,
                allow_unicode=True,
                sort_keys=False,
                width=sys.maxsize,
            ).rstrip("\n")
        )
    return "\n".join(lines) + "\n"


class _RecipeDumper(yaml.SafeDumper):
    """Quotes strings that a recipe would read as null, and strings with unusual line breaks."""


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # A line break other than \n is folded on reading unless escaped, which needs double quotes.
    quoted = value in _NULL or not _UNICODE_BREAKS.isdisjoint(value)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if quoted else None)


_RecipeDumper.add_representer(str, _represent_str)


def read_recipe(
    path: str, schema: Mapping[str, FieldPlace], *, ignored: Collection[str] = ()
) -> tuple[dict[str, object], str | None]:
    """Read the field values of a recipe, and the preset it names.

    Args:
        path: of the recipe.
        schema: the fields.
        ignored: keys that are passed over: settings of another kind of run.
    """
    return read_values(recipe_nodes(path), schema, path=path, ignored=ignored)


def read_values(
    pairs: Iterable[tuple[yaml.Node, yaml.Node]],
    schema: Mapping[str, FieldPlace],
    *,
    path: str,
    ignored: Collection[str] = (),
) -> tuple[dict[str, object], str | None]:
    """Read field values, and the preset's name, from the keys and values of a mapping.

    Args:
        pairs: key and value nodes.
        schema: the fields.
        path: of the file, for messages.
        ignored: keys that are passed over: settings of another kind of run.

    Raises:
        ConfigError: a key is unknown or set twice, or a value is of another type.
    """
    values: dict[str, object] = {}
    preset: str | None = None
    for key_node, value_node in pairs:
        where = f"{path}:{key_node.start_mark.line + 1}"
        written = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.tag)
        key = written.replace("-", "_")
        if key in values or (key == "preset" and preset is not None):
            raise ConfigError(f"key {written!r} is set a second time in {where}; keep one of them")
        if key == "preset":
            preset = typing.cast(str, _convert(value_node, str, key=key, where=where))
        elif key in ignored and key not in schema:
            continue
        elif key in schema:
            values[key] = _convert(value_node, schema[key].hint, key=key, where=where)
        else:
            hint = did_you_mean(written, (*schema, "preset")) or "; see --help for all keys"
            raise ConfigError(f"unknown key {written!r} in {where}{hint}")
    return values, preset


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML of plain values and rejects aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Parse one value; raise ComposerError for an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"recipes take no aliases: write *{event.anchor} out", event.start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def plain_values(text: str) -> object:
    """Parse YAML text into dicts, lists and scalars; works for recipes of any version.

    Raises:
        ValueError: it is not YAML, or has other tags, aliases, or too much nesting.
    """
    try:
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def recipe_nodes(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Parse a recipe into its key and value nodes, without constructing objects.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            text = read_at_most(file, _MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path!r}: {error.strerror}; --config takes a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path!r} is not UTF-8 text: {error}") from error
    try:
        root = _PlainLoader(text).get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the recipe {path!r} is not valid YAML: {error}") from error
    if root is None or (_is_plain(root) and root.value == ""):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"the recipe {path!r} must be a mapping, one `key: value` a line, not {_describe(root)}"
        )
    return root.value


def _convert(node: yaml.Node, hint: Any, *, key: str, where: str) -> object:
    """Convert one node to the type of its field."""
    tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if tag not in _IMPLICIT_TAGS:
        raise ConfigError(
            f"key {key!r} in {where} has the tag {node.tag!r}; recipes take no tags, remove it"
        )
    inner, is_optional = strip_optional(hint)
    if is_optional and _is_plain(node) and node.value in _NULL:
        return None
    wrong = ConfigError(
        f"key {key!r} in {where} must be {_expectation(hint)}, not {_describe(node)}"
    )
    if typing.get_origin(inner) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise wrong
        return _convert_entries(node, typing.get_args(inner)[0], key=key, where=where)
    if not isinstance(node, yaml.ScalarNode):
        raise wrong
    if typing.get_origin(inner) is Literal:
        if node.value not in typing.get_args(inner):
            raise wrong
        return node.value
    if inner is str:
        if _is_plain(node) and node.value in _NULL:
            raise wrong
        return node.value
    if not _is_plain(node):
        raise wrong
    try:
        return _PARSERS[inner](node.value)
    except ValueError:
        raise wrong from None


def _convert_entries(
    node: yaml.SequenceNode, element: Any, *, key: str, where: str
) -> tuple[object, ...]:
    """Convert the entries of a list; records are numbered in error messages."""
    if not dataclasses.is_dataclass(element):
        return tuple(_convert(each, element, key=key, where=where) for each in node.value)
    return tuple(
        _convert_record(each, element, key=f"{key}[{number}]", where=where)
        for number, each in enumerate(node.value, start=1)
    )


def _convert_record(node: yaml.Node, record: Any, *, key: str, where: str) -> object:
    """Convert one mapping to a record, as strictly as the recipe itself."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key} in {where} must be a mapping, not {_describe(node)}")
    path = where.rpartition(":")[0]
    hints = typing.get_type_hints(record)
    fields = {field.name: field for field in dataclasses.fields(record)}
    values: dict[str, object] = {}
    for name_node, value_node in node.value:
        place = f"{path}:{name_node.start_mark.line + 1}"
        written = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else name_node.tag
        name = written.replace("-", "_")
        if name not in fields:
            hint = did_you_mean(written, fields) or f"; it takes {', '.join(fields)}"
            raise ConfigError(f"unknown key {written!r} of {key} in {place}{hint}")
        if name in values:
            raise ConfigError(
                f"key {written!r} of {key} is set a second time in {place}; keep one of them"
            )
        values[name] = _convert(value_node, hints[name], key=f"{key}.{name}", where=place)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{key} in {path}:{node.start_mark.line + 1} lacks {', '.join(missing)}; each needs"
            f" {', '.join(fields)}"
        )
    return record(**values)


def is_recipe_only(hint: Any) -> bool:
    """Return whether a field holds records, which a recipe can set and a flag cannot."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(arguments[0])


def _parse_bool(text: str) -> bool:
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(text)


def _parse_float(text: str) -> float:
    return float(_SPECIAL_FLOATS.get(text.lower(), text))


_PARSERS: dict[Any, Callable[[str], object]] = {
    bool: _parse_bool,
    int: int,
    float: _parse_float,
}


def _is_plain(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True; return any other type with False."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    inner = [each for each in typing.get_args(hint) if each is not types.NoneType]
    if len(inner) != 1:
        raise TypeError(f"a field has the type {hint}; of unions only `X | None` is supported")
    return inner[0], True


def _expectation(hint: Any, *, is_element: bool = False) -> str:
    """Describe in words which values a field takes.

    Raises:
        TypeError: a recipe cannot hold this type; a bug of the application.
    """
    inner, is_optional = strip_optional(hint)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if is_optional:
        return f"{_expectation(inner)}, or null"
    if origin is Literal and all(isinstance(choice, str) for choice in arguments):
        return f"one of {', '.join(arguments)}"
    if is_recipe_only(inner) and not is_element:
        for entry in typing.get_type_hints(arguments[0]).values():
            _expectation(entry)
        return f"a list of mappings ({', '.join(typing.get_type_hints(arguments[0]))})"
    if origin is tuple and arguments[1:] == (...,) and not is_element:
        return f"a list, each entry {_expectation(arguments[0], is_element=True)}"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    if inner not in words:
        raise TypeError(f"a field has the type {hint}, which flags and recipes cannot set")
    return words[inner]


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        if not _is_plain(node):
            return f"the quoted string {node.value!r}"
        return "null" if node.value in _NULL else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
