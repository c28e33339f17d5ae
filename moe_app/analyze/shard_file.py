"""Writes and reads a shard's Parquet files; a file that is read may be anyone's.

pyarrow decodes what a file says of itself, so that is compared first with what the collection's
manifest says it must be: schema, rows, values of each column. Columns are stored uncompressed, and
a compressed one is refused: a few bytes could stand for more than memory holds.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.io.atomic_write import atomic_write
from megatron.trainer.io.bounded_read import open_regular
from megatron.trainer.io.hashing import add_file

MOST_ROWS = 1 << 24
"""Of a file; `collect` writes far fewer."""
_BLOCK_BYTES = 1 << 20
_MOST_THRIFT_BYTES = 1 << 26
_COLLECT = "collect the routing again into an empty directory"


@dataclass(frozen=True, kw_only=True)
class Column:
    """Describes a column: one number a row, or `width` of them."""

    name: str
    dtype: type[np.generic]
    width: int = 0


@contextlib.contextmanager
def needs_pyarrow() -> Iterator[None]:
    """Name the extra to install where pyarrow is missing.

    Raises:
        ConfigError: it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pyarrow":
            raise
        raise ConfigError(
            "pyarrow is not installed; routing is kept in Parquet files; install it with pip"
            " install 'megatron-moe[data]'"
        ) from error


def check_pyarrow() -> None:
    """Fail before the work if pyarrow is missing.

    Raises:
        ConfigError: it is.
    """
    with needs_pyarrow():
        import pyarrow.parquet  # noqa: F401


def write_table(path: Path, columns: Sequence[Column], values: Mapping[str, Any]) -> None:
    """Write arrays as a Parquet file that appears when it is complete.

    Args:
        path: of the file.
        columns: what it has.
        values: [rows] or [rows, width] of each column.

    Raises:
        DataError: it cannot be written.
    """
    with needs_pyarrow():
        import pyarrow as pa
        import pyarrow.parquet as pq
    schema = _schema(columns)
    arrays = []
    for column in columns:
        flat = pa.array(np.ascontiguousarray(values[column.name], column.dtype).reshape(-1))
        if column.width:
            flat = pa.FixedSizeListArray.from_arrays(flat, type=schema.field(column.name).type)
        arrays.append(flat)
    table = pa.Table.from_arrays(arrays, schema=schema)
    # Experts take few values: their numbers in a dictionary are bit-packed.
    coded = [f"{each.name}.list.element" for each in columns if each.name.endswith(".experts")]
    try:
        with atomic_write(path, durable=True) as file:
            pq.write_table(
                table,
                file,
                compression="none",
                use_dictionary=coded,
                row_group_size=max(1, len(table)),
            )
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; free some space or name another"
            " --output"
        ) from error


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file that was just written."""
    found = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        size = add_file(found, file)
    return {"bytes": size, "sha256": found.hexdigest()}


class ShardFile:
    """Reads columns of a Parquet file that a manifest describes. Use it in a `with` statement.

    Args:
        path: of the file.
        columns: what it must have.
        rows: how many it must have.
        described: its size and digest, as `describe_file` returned them; None was compared before.

    Raises:
        DataError: it is another file, or damaged.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[Column],
        *,
        rows: int,
        described: Mapping[str, Any] | None,
    ) -> None:
        with needs_pyarrow():
            import pyarrow.parquet as pq
        self.path = path
        self._columns = {column.name: column for column in columns}
        try:
            self._file: BinaryIO = open(open_regular(path), "rb")
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}; {_COLLECT}"
            ) from error
        try:
            if described is not None:
                self._check_bytes(described)
            self._parquet: Any = self._guarded(
                lambda: pq.ParquetFile(
                    self._file,
                    thrift_string_size_limit=_MOST_THRIFT_BYTES,
                    thrift_container_size_limit=_MOST_THRIFT_BYTES,
                )
            )
            self._check(rows)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Read columns as [rows] or [rows, width].

        Raises:
            DataError: the file is damaged.
        """
        table = self._guarded(lambda: self._parquet.read(columns=list(names), use_threads=False))
        found = {}
        for name in names:
            column = self._columns[name]
            chunks = table[name].combine_chunks()
            if chunks.null_count:
                raise DataError(f"{self.path}: column {name} has gaps; {_COLLECT}")
            if column.width:
                array = chunks.flatten().to_numpy(zero_copy_only=False)
                found[name] = array.reshape(-1, column.width)
            else:
                found[name] = chunks.to_numpy(zero_copy_only=False)
            if len(found[name]) != self._parquet.metadata.num_rows:
                raise DataError(f"{self.path}: column {name} is cut off; {_COLLECT}")
        return found

    def _check_bytes(self, described: Mapping[str, Any]) -> None:
        """Compare size and digest with the manifest's."""
        found = hashlib.sha256()
        count = 0
        while block := self._file.read(_BLOCK_BYTES):
            found.update(block)
            count += len(block)
            if count > described["bytes"]:
                break
        self._file.seek(0)
        if count != described["bytes"] or found.hexdigest() != described["sha256"]:
            raise DataError(
                f"{self.path} is not the file that the manifest lists ({described['bytes']:,}"
                f" bytes, SHA-256 {described['sha256'][:12]}...): it was changed, or is of another"
                f" collection; restore it, or {_COLLECT}"
            )

    def _check(self, rows: int) -> None:
        """Refuse another schema, another size, and compressed columns."""
        wanted, found = _schema(list(self._columns.values())), self._guarded(self._schema_found)
        if not found.equals(wanted):
            names = {field.name for field in found} ^ {field.name for field in wanted}
            which = ", ".join(sorted(names)[:4]) or "the types of its columns"
            raise DataError(
                f"{self.path} has another schema than a shard of this collection ({which});"
                f" {_COLLECT}"
            )
        metadata = self._parquet.metadata
        if metadata.num_rows != rows or rows > MOST_ROWS:
            raise DataError(
                f"{self.path} has {metadata.num_rows:,} rows, but the manifest says {rows:,}, and"
                f" at most {MOST_ROWS:,} are read; {_COLLECT}"
            )
        for group in range(metadata.num_row_groups):
            self._check_group(metadata.row_group(group), rows)

    def _schema_found(self) -> Any:
        return self._parquet.schema_arrow.remove_metadata()

    def _check_group(self, group: Any, rows: int) -> None:
        for index in range(group.num_columns):
            chunk = group.column(index)
            column = self._columns[chunk.path_in_schema.partition(".list.")[0]]
            most = rows * max(1, column.width)
            if chunk.compression != "UNCOMPRESSED":
                raise DataError(
                    f"{self.path}: column {column.name} is compressed with {chunk.compression};"
                    " shards are not compressed, so that none can be larger in memory than on disk;"
                    f" {_COLLECT}"
                )
            if not 0 <= chunk.num_values <= most:
                raise DataError(
                    f"{self.path}: column {column.name} has {chunk.num_values:,} values, but"
                    f" {rows:,} rows take {most:,}; {_COLLECT}"
                )

    def _guarded(self, action: Any) -> Any:
        """Run a call of pyarrow, whose errors on damaged files are of several classes."""
        import pyarrow as pa

        try:
            return action()
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.path} cannot be read as Parquet: {said}; it is damaged; {_COLLECT}"
            ) from error


def _schema(columns: Sequence[Column]) -> Any:
    import pyarrow as pa

    fields = []
    for column in columns:
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
        if column.width:
            kind = pa.list_(pa.field("element", kind, nullable=False), column.width)
        fields.append(pa.field(column.name, kind, nullable=False))
    return pa.schema(fields)
