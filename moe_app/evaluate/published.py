"""Reads what papers published, and compares evaluations with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.trainer.errors import DataError
from megatron.trainer.records.run_dir import run_names

PUBLISHED = Path(__file__).with_name("published.yaml")
RESULTS_NAME = "results.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Holds the results of one evaluation."""

    name: str
    results: Mapping[str, Any]
    """Metrics by task, as in `results.json`."""
    config: Mapping[str, Any]
    """What is known of the model."""

    def value(self, where: Sequence[Any]) -> float | None:
        """Return what a column has for this evaluation; None if it was not evaluated.

        Args:
            where: a task and its metric, or `config`, a field and a factor; empty for none.
        """
        if not where:
            return None
        if where[0] == "config":
            found, factor = self.config.get(where[1]), where[2]
        else:
            metrics = self.results.get(where[0])
            found, factor = metrics.get(where[1]) if isinstance(metrics, dict) else None, 1.0
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return found * factor if is_number else None


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Holds a published table."""

    name: str
    title: str
    source: str
    """The paper and its table or figure."""
    unit: str
    """Percent are 100 times what an evaluation has."""
    columns: tuple[tuple[str, Sequence[Any]], ...]
    """Name of each, and what of an evaluation is compared with it."""
    rows: Mapping[str, Sequence[float | None]]
    """Published values by model."""
    suite: str | None
    """Task without which an evaluation is of another protocol; None for none."""

    def row_of(self, evaluation: Evaluation) -> list[float | None]:
        """Return the values of an evaluation, one a column; all None if it has none of them."""
        if self.suite is not None and self.suite not in evaluation.results:
            return [None] * len(self.columns)
        factor = 100.0 if self.unit == "%" else 1.0
        found = [evaluation.value(where) for _, where in self.columns]
        values = [None if value is None else value * factor for value in found]
        whole = [value for value, (_, where) in zip(values, self.columns, strict=True) if where]
        if None not in whole:
            # The average is over all columns, or it would compare different tasks.
            mean = sum(value for value in whole if value is not None) / len(whole)
            pairs = zip(values, self.columns, strict=True)
            values = [value if where else mean for value, (_, where) in pairs]
        return values


def read_published() -> list[PublishedTable]:
    """Read the tables of the papers."""
    return [
        PublishedTable(
            name=each["name"],
            title=each["title"],
            source=each["source"],
            unit=each["unit"],
            columns=tuple((name, tuple(where)) for name, where in each["columns"]),
            rows=each["rows"],
            suite=each.get("suite"),
        )
        for each in yaml.safe_load(PUBLISHED.read_text("utf-8"))
    ]


def read_evaluations(paths: Sequence[Path]) -> list[Evaluation]:
    """Read `results.json` of each path, which is that file or its directory.

    Raises:
        UserError: one is not there, is no file of results, or is given twice.
    """
    files = [path / RESULTS_NAME if path.is_dir() else path for path in paths]
    names = run_names([file.parent for file in files])
    found = []
    for file, name in zip(files, names, strict=True):
        try:
            whole = json.loads(file.read_text("utf-8"))
            results, config = whole["results"], whole.get("config") or {}
            if not isinstance(results, dict) or not isinstance(config, dict):
                raise TypeError("results and config must be objects")
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror or error}; name the --output of an"
                " evaluation that has ended, or its results.json"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file} has no results of an evaluation: {error!r}; name the --output of one"
            ) from error
        found.append(Evaluation(name=name, results=results, config=config))
    return found
