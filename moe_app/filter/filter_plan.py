"""Holds all that decides a filtered corpus, and keeps it in the output folder as plan.json.

A later start, and every task of a cluster, reads it there. It is data: nothing in it is executed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.data.token_manifest import identify_tokenizer
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small
from moe_app.data.sources import SourceFile, find_sources
from moe_app.filter.filter_specs import FilterSpec, MinhashRule, make_spec

PLAN_FILE = "plan.json"
_MOST_BYTES = 1 << 28
_MOST_COMPARED = 100_000
"""datatrove orders signatures by their files' names, numbers of five digits."""
_FORMAT = 1


@dataclass(frozen=True)
class CountingTokenizer:
    """Names the tokenizer that counts tokens."""

    type: str
    model: str
    sha256: str
    eod_token: str | None = None
    """As --eod-token: what ends documents, which no text becomes."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Says how kept documents are tokenized, as the flags of preprocessing of these names."""

    append_eod: bool
    eod_token: str | None


@dataclass(frozen=True, kw_only=True)
class FilterPlan:
    """Describes what is read and which filters it passes, in order."""

    sources: tuple[SourceFile, ...]
    text_key: str
    filters: tuple[FilterSpec, ...]
    tokenizer: CountingTokenizer | None
    evaluation: tuple[tuple[SourceFile, ...], ...]
    """The evaluation files of each filter; empty for filters that have none."""
    tokens: TokenSettings | None = None
    """None where documents are not tokenized."""
    max_bad_lines: int
    """May be raised between two starts."""

    def decides_alike(self, other: "FilterPlan") -> bool:
        """Return whether another plan makes the same corpus."""
        return dataclasses.replace(other, max_bad_lines=self.max_bad_lines) == self


def make_plan(
    *,
    inputs: Sequence[str],
    text_key: str,
    filters: Sequence[FilterSpec],
    tokenizer_type: str,
    tokenizer_model: str | None,
    max_bad_lines: int,
    eod_token: str | None = None,
    tokens: TokenSettings | None = None,
) -> FilterPlan:
    """Look at the files and check that the filters have what they need.

    Raises:
        ConfigError: There is no filter, one needs a tokenizer and none is named, or none does, and
            the end of documents is named.
        DataError: An input or the tokenizer is missing or bad.
    """
    if not filters:
        raise ConfigError("no filter is named; there must be one at least; add --filter NAME")
    tokenizer = None
    needing = [f"{spec.name} counts tokens" for spec in filters if spec.needs_tokenizer]
    needing += ["--tokenize makes tokens"] if tokens is not None else []
    if needing:
        if not tokenizer_model:
            raise ConfigError(
                f"{needing[0]}, but no tokenizer is named; it must be the model's;"
                " add --tokenizer-type and --tokenizer-model"
            )
        named = identify_tokenizer(tokenizer_type, tokenizer_model)
        path = str(named.path.absolute())
        tokenizer = CountingTokenizer(tokenizer_type, path, named.sha256, eod_token)
    elif eod_token is not None:
        raise ConfigError(
            f"--eod-token {eod_token!r} is a token of the tokenizer, but no filter counts tokens"
            " and none are made; add --tokenize, or leave the flag out"
        )
    sources = tuple(find_sources(inputs))
    if len(sources) > _MOST_COMPARED and any(isinstance(f.options, MinhashRule) for f in filters):
        raise ConfigError(
            f"minhash compares {len(sources):,} files; it takes up to {_MOST_COMPARED:,}; join some"
        )
    evaluation = []
    for spec in filters:
        against = getattr(spec.options, "against", None)
        evaluation.append(tuple(find_sources(against.split("+"))) if against else ())
    return FilterPlan(
        sources=sources,
        text_key=text_key,
        filters=tuple(filters),
        tokenizer=tokenizer,
        evaluation=tuple(evaluation),
        tokens=tokens,
        max_bad_lines=max_bad_lines,
    )


def write_plan(plan: FilterPlan, folder: Path) -> None:
    """Write plan.json."""
    value = dataclasses.asdict(plan) | {
        "format": _FORMAT,
        "filters": [spec.as_json() for spec in plan.filters],
    }
    write_text(folder / PLAN_FILE, json.dumps(value, indent=1) + "\n")


def read_plan(folder: Path) -> FilterPlan | None:
    """Return the plan of an output folder; None where there is none.

    Raises:
        DataError: The file is damaged or of another version.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        return None
    try:
        value = json.loads(read_small(path, most_bytes=_MOST_BYTES))
        if value["format"] != _FORMAT:
            raise ValueError(f"its format is {value['format']}, not {_FORMAT}")
        tokenizer, tokens = value["tokenizer"], value.get("tokens")
        return FilterPlan(
            sources=_sources(value["sources"]),
            text_key=str(value["text_key"]),
            filters=tuple(
                make_spec(name, options)
                for each in value["filters"]
                for name, options in each.items()
            ),
            tokenizer=CountingTokenizer(**tokenizer) if tokenizer else None,
            evaluation=tuple(map(_sources, value["evaluation"])),
            tokens=TokenSettings(**tokens) if tokens else None,
            max_bad_lines=int(value["max_bad_lines"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise DataError(
            f"{path} is not as this command writes it ({error}); choose another --output, or remove"
            " the folder"
        ) from error


def _sources(values: Sequence[Mapping[str, Any]]) -> tuple[SourceFile, ...]:
    return tuple(SourceFile(**value) for value in values)


def settle_plan(plan: FilterPlan, folder: Path) -> None:
    """Write the plan into the output folder, or check that it is the one begun there.

    Raises:
        ConfigError: Another corpus was begun there, or the folder holds other files.
    """
    begun = read_plan(folder)
    if begun is None:
        # Left where a start was killed while it wrote the plan.
        if any(not each.name.startswith(f"{PLAN_FILE}.tmp-") for each in folder.iterdir()):
            raise ConfigError(
                f"--output {folder} holds files but no {PLAN_FILE}; it must be empty, or hold a"
                " corpus begun by this command; choose another folder"
            )
    elif not plan.decides_alike(begun):
        changed = [
            field.name
            for field in dataclasses.fields(plan)
            if field.name != "max_bad_lines"
            and getattr(plan, field.name) != getattr(begun, field.name)
        ]
        raise ConfigError(
            f"--output {folder} was begun with other {', '.join(changed)}; a corpus is of one"
            " recipe and unchanged files; choose another folder, or remove this one"
        )
    write_plan(plan, folder)
