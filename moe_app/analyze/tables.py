"""Keeps a measure's numbers as a table, and writes it as CSV and Parquet."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import write_bytes
from moe_app.analyze.shard_file import needs_pyarrow


@dataclass(frozen=True, kw_only=True)
class Table:
    """Holds columns of equal length."""

    name: str
    """Of its files, without suffix."""
    columns: dict[str, Any]
    """Arrays or lists by name, in order."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def rows(self, **wanted: object) -> list[dict[str, Any]]:
        """Return the rows that have these values."""
        lists = {name: np.asarray(values).tolist() for name, values in self.columns.items()}
        keep = [
            index
            for index in range(len(self))
            if all(lists[name][index] == value for name, value in wanted.items())
        ]
        return [{name: values[index] for name, values in lists.items()} for index in keep]


def from_rows(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table of rows."""
    turned = list(zip(*rows, strict=True)) if rows else [() for _ in columns]
    return Table(name=name, columns=dict(zip(columns, map(list, turned), strict=True)))


def joined(name: str, tables: Sequence[Table]) -> Table:
    """Return tables of the same columns one below the other."""
    columns = {
        column: np.concatenate([np.asarray(table.columns[column]) for table in tables])
        for column in tables[0].columns
    }
    return Table(name=name, columns=columns)


def write_tables(directory: Path, tables: Sequence[Table]) -> None:
    """Write NAME.csv and NAME.parquet of each table.

    Raises:
        DataError: they cannot be written.
    """
    with needs_pyarrow():
        import pyarrow as pa
        import pyarrow.parquet as pq
    for table in tables:
        content = pa.table({name: pa.array(values) for name, values in table.columns.items()})
        text, binary = io.StringIO(), io.BytesIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(zip(*(column.to_pylist() for column in content.columns), strict=True))
        pq.write_table(content, binary, compression="zstd")
        write_file(directory / f"{table.name}.csv", text.getvalue().encode("utf-8"))
        write_file(directory / f"{table.name}.parquet", binary.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Replace a file, making its directory if it is not there.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; free some space or give another"
            " --output"
        ) from error
