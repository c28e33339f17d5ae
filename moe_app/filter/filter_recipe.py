"""Reads the command's settings from a YAML recipe; flags given beside it go first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.trainer.config.recipe import did_you_mean, plain_values
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.bounded_read import read_small
from moe_app.filter.filter_specs import FilterSpec, make_spec

_MOST_BYTES = 1 << 20

_KINDS: dict[str, type] = {
    "input": list,
    "output": str,
    "filters": list,
    "text_key": str,
    "tokenizer_type": str,
    "tokenizer_model": str,
    "tokenize": bool,
    "append_eod": bool,
    "eod_token": str,
    "max_bad_lines": int,
    "executor": str,
    "tasks": int,
    "workers": int,
    "slurm": dict,
}
"""Keys of a recipe: the flags' names, and `filters`."""
_WORDS = {
    list: "a list",
    str: "a text",
    int: "a whole number",
    dict: "a mapping",
    bool: "true or false",
}


def read_filter_recipe(path: str) -> dict[str, Any]:
    """Return a recipe's settings, `filters` as FilterSpecs.

    Raises:
        ConfigError: It is not YAML, or holds a key or value that means nothing.
        OSError: It cannot be read.
    """
    try:
        values = plain_values(read_small(Path(path), most_bytes=_MOST_BYTES).decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not a YAML recipe ({error}); repair it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping; write a line for each setting: key: value")
    for key, value in values.items():
        if key not in _KINDS:
            raise ConfigError(
                f"{path}: no setting is named {key!r}{did_you_mean(str(key), _KINDS)}; it must be"
                f" one of {', '.join(_KINDS)}"
            )
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool) > (_KINDS[key] is bool):
            raise ConfigError(f"{path}: {key} is {value!r}; it must be {_WORDS[_KINDS[key]]}")
    if not all(isinstance(each, str) for each in values.get("input", ())):
        raise ConfigError(f"{path}: input must be a list of paths")
    if "slurm" in values:
        values["slurm"] = [f"{key}={value}" for key, value in values["slurm"].items()]
    return values | {"filters": [_spec(path, each) for each in values.get("filters", ())]}


def _spec(path: str, entry: object) -> FilterSpec:
    """Return a filter written as its name, or as its name and a mapping of its settings."""
    if isinstance(entry, str):
        return make_spec(entry, {})
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(options, Mapping):
            return make_spec(str(name), options)
    raise ConfigError(
        f"{path}: {entry!r} is no filter; write its name, or its name and a mapping of settings"
    )
