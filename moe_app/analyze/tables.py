"""Keeps a measure's numbers as a table, and writes it as CSV and Parquet."""

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.analyze.shard_file import needs_pyarrow

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Table:
    """Holds columns of equal length."""

    name: str
    """Of its files, without suffix."""
    columns: dict[str, Any]
    """Arrays, lists or pyarrow's chunked arrays by name, in order."""

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
    """Return tables of the same columns one below the other, without a copy of their numbers.

    Raises:
        ConfigError: pyarrow is missing.
    """
    with needs_pyarrow():
        import pyarrow as pa
    columns = {}
    for column in tables[0].columns:
        chunks = [pa.array(table.columns[column]) for table in tables]
        if pa.types.is_string(chunks[0].type):
            chunks = [chunk.dictionary_encode() for chunk in chunks]  # few names, many rows
        columns[column] = pa.chunked_array(chunks).unify_dictionaries()
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
        content = pa.table(
            {
                name: values if isinstance(values, pa.ChunkedArray) else pa.array(values)
                for name, values in table.columns.items()
            }
        )
        with _replacing(directory / f"{table.name}.csv") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(table.columns)
            # A number is far larger as an object of Python than in its column.
            for batch in content.to_batches(max_chunksize=_BLOCK_ROWS):
                writer.writerows(zip(*map(_as_list, batch.columns), strict=True))
            text.detach()
        with _replacing(directory / f"{table.name}.parquet") as file:
            # Without Arrow's schema names are read as texts, not as dictionaries.
            pq.write_table(content, file, compression="zstd", store_schema=False)


def _as_list(column: Any) -> list[Any]:
    """Return the values of a pyarrow array; its own `to_pylist` is many times as slow."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
    return values


def write_file(path: Path, content: bytes) -> None:
    """Replace a file, making its directory if it is not there.

    Raises:
        DataError: it cannot be written.
    """
    with _replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write that replaces `path` when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; free some space or give another"
            " --output"
        ) from error
