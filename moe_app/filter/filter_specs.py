"""Reads filters as they are written: `NAME[:key=value,...]`, or an entry of a recipe."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.trainer.config.recipe import did_you_mean
from megatron.trainer.data.repetition import RepetitionRule
from megatron.trainer.errors import ConfigError
from moe_app.filter.overlap import OverlapRule
from moe_app.filter.rules import LengthRule, StarcoderRule


@dataclass(frozen=True, kw_only=True)
class ExactRule:
    """Drops what was there before, word by word."""

    by: Literal["document", "paragraph"] = "document"
    """What is compared; of paragraphs, which blank lines part, those seen before are cut out."""

    def __post_init__(self) -> None:
        if self.by not in ("document", "paragraph"):
            raise ConfigError(f"by is {self.by!r}; it must be document or paragraph")


@dataclass(frozen=True, kw_only=True)
class MinhashRule:
    """Drops documents like one before; the defaults are datatrove's and FineWeb's.

    Two documents whose n-grams agree in a share s are found alike with probability
    1 - (1 - s ** hashes) ** buckets: half of them at s = 0.71.
    """

    ngram: int = 5
    """Words of an n-gram."""
    buckets: int = 14
    hashes: int = 8
    """Hashes of a bucket, all of which must agree."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("ngram", "buckets", "hashes", "seed"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DecontaminateRule(OverlapRule):
    """Drops documents that hold an n-gram of an evaluation text."""

    against: str
    """File, folder or pattern of evaluation texts; more than one with + between them."""
    key: str = "text"
    """Where in an evaluation item its text is."""


Options = RepetitionRule | StarcoderRule | LengthRule | ExactRule | MinhashRule | DecontaminateRule
FILTERS: dict[str, type[Options]] = {
    "repeated-ngram": RepetitionRule,
    "starcoder": StarcoderRule,
    "length": LengthRule,
    "exact": ExactRule,
    "minhash": MinhashRule,
    "decontaminate": DecontaminateRule,
}
"""Names of filters and what can be set."""


@dataclass(frozen=True)
class FilterSpec:
    """Names a filter and what is set of it."""

    name: str
    options: Options

    @property
    def needs_tokenizer(self) -> bool:
        """Return whether it counts tokens."""
        options = self.options
        return isinstance(options, RepetitionRule) or (
            isinstance(options, LengthRule) and options.unit == "tokens"
        )

    def as_json(self) -> dict[str, object]:
        """Return the form that `make_spec` reads."""
        return {self.name: dataclasses.asdict(self.options)}


def parse_filter(text: str) -> FilterSpec:
    """Read `NAME[:key=value,...]`.

    Raises:
        ConfigError: A name, key or value is none of those there are.
    """
    name, _, settings = text.partition(":")
    options: dict[str, object] = {}
    for setting in settings.split(",") if settings else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--filter {text}: {setting!r} sets nothing; write key=value, with a comma between"
                " two"
            )
        if key in options:
            raise ConfigError(f"--filter {text}: {key} is set twice; set it once")
        options[key] = value
    return make_spec(name, options)


def make_spec(name: str, options: Mapping[str, object]) -> FilterSpec:
    """Check a filter's name and options.

    Args:
        name: In `FILTERS`.
        options: Values as written, texts of numbers too.

    Raises:
        ConfigError: A name, key or value is none of those there are.
    """
    if name not in FILTERS:
        raise ConfigError(
            f"no filter is named {name!r}{did_you_mean(name, FILTERS)}; it must be one of"
            f" {', '.join(FILTERS)}"
        )
    kind = FILTERS[name]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for written, value in options.items():
        key = str(written).replace("-", "_")
        if key not in hints:
            raise ConfigError(
                f"{name} has no setting {written!r}{did_you_mean(key, hints)}; it has"
                f" {', '.join(hints)}"
            )
        values[key] = _convert(value, hints[key], where=f"{name}: {written}")
    needed = [
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.name not in values
    ]
    if needed:
        raise ConfigError(f"{name} needs {', '.join(needed)}; write {name}:{needed[0]}=...")
    try:
        made: Any = kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return FilterSpec(name, made)


def _convert(value: object, hint: Any, *, where: str) -> object:
    """Return a value in a setting's type, from text or as a recipe has it."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = [each for each in typing.get_args(hint) if each is not types.NoneType]
    if hint is str or typing.get_origin(hint) is Literal:
        if isinstance(value, str):
            return value
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float and number == number:
                return number
            if hint is int and number.is_integer():
                return int(number)
        except (ValueError, OverflowError):
            pass
    kind = {int: "a whole number", float: "a number"}.get(hint, "a text")
    raise ConfigError(f"{where} is {value!r}; it must be {kind}")
