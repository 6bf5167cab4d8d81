"""The one schema of logs and items, and the checks that refuse a bad file.

A message names the file, the column, the row (counted from 0), what was wanted and what came.
docs/data.md lists the columns for users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from onerec.errors import DataError

Kind = Literal["id", "time", "integer", "number", "flag", "text", "words", "texts", "vectors"]

_WANTED: dict[Kind, str] = {
    "id": "integers below 2^63 or strings, never null",
    "time": "integers of 0 or more (ms since 1970), timestamps or dates, never null",
    "integer": "integers of 0 or more, never null",
    "number": "numbers of 0 or more (null where unknown)",
    "flag": "booleans or 0/1 (null counts as 0)",
    "text": "strings",
    "words": "strings or lists of strings",
    "texts": "lists of strings",
    "vectors": "lists of floats",
}

REWRITE = '"Other files and units" in docs/data.md'


@dataclass(frozen=True)
class Column:
    """A column of the schema.

    Args:
        name: Its name in the file.
        kind: What it holds.
        required: Whether a file without it is refused.
    """

    name: str
    kind: Kind
    required: bool = False


FLAGS = ("click", "long_view", "like", "follow", "share", "comment", "hate")

INTERACTIONS = (
    Column("user_id", "id", required=True),
    Column("item_id", "id", required=True),
    Column("timestamp", "time", required=True),
    Column("request_id", "id"),
    Column("session_id", "id"),
    Column("watch_time_ms", "number"),
    Column("duration_ms", "number"),
    *(Column(name, "flag") for name in FLAGS),
)

ITEMS = (
    Column("item_id", "id", required=True),
    Column("text", "text"),
    Column("tags", "words"),
    Column("duration_ms", "number"),
    Column("embedding", "vectors"),
)


def bad(
    path: Path | str,
    problem: str,
    *,
    column: str | None = None,
    row: int | None = None,
) -> DataError:
    """A `DataError` whose message starts with the place: file, column, row (from 0)."""
    place = [str(path)]
    if column is not None:
        place.append(f"column {column!r}")
    if row is not None:
        place.append(f"row {row}")
    return DataError(f"{', '.join(place)}: {problem}")


def is_text(type_: pa.DataType) -> bool:
    """Whether an Arrow type holds strings, dictionary-encoded or not."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
    )


def is_time(type_: pa.DataType) -> bool:
    """Whether an Arrow type holds points in time: timestamps of any unit and zone, or dates."""
    return bool(pa.types.is_timestamp(type_) or pa.types.is_date(type_))


def _fits(kind: Kind, type_: pa.DataType) -> bool:
    number = bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))
    if kind == "id":
        return bool(pa.types.is_integer(type_)) or is_text(type_)
    if kind == "time" and is_time(type_):
        return True
    if kind in ("integer", "time"):
        return bool(pa.types.is_integer(type_))
    if kind == "number":
        return number
    if kind == "flag":
        return number or bool(pa.types.is_boolean(type_))
    if kind in ("text", "words") and is_text(type_):
        return True
    listed = bool(pa.types.is_list(type_) or pa.types.is_large_list(type_))
    if kind == "vectors":
        listed = listed or bool(pa.types.is_fixed_size_list(type_))
        return listed and bool(pa.types.is_floating(type_.value_type))
    return kind != "text" and listed and is_text(type_.value_type)


def read_footer(path: Path) -> tuple[pa.Schema, int]:
    """The Arrow schema and the number of rows of a Parquet file.

    Raises:
        DataError: The file is missing, is not Parquet, or was cut short.
    """
    if not path.is_file():
        raise bad(path, "there is no such file")
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, int(file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise bad(
            path, f"not a whole Parquet file (cut short or of another format): {error}"
        ) from error


def check_columns(path: Path, schema: pa.Schema, columns: tuple[Column, ...]) -> None:
    """Checks that a file has the required columns and that known columns have a right type.

    An optional column without any value may have Arrow's null type.

    Raises:
        DataError: A column is missing or holds another type.
    """
    for column in columns:
        if column.name not in schema.names:
            if column.required:
                raise bad(
                    path,
                    f"the column is missing; the file has {', '.join(schema.names)}",
                    column=column.name,
                )
            continue
        type_ = schema.field(column.name).type
        if pa.types.is_null(type_) and not column.required:
            continue
        if not _fits(column.kind, type_):
            raise bad(
                path,
                f"wanted {_WANTED[column.kind]}, got {type_} ({REWRITE} shows how to rewrite it)",
                column=column.name,
            )


def check_values(path: Path, table: Any, columns: tuple[Column, ...], row: str) -> None:
    """Checks the values of a file in one pass: nulls, negative numbers, NaN, flags beyond 0/1.

    Args:
        path: The file, for messages.
        table: An Ibis table over it.
        columns: What to check; columns that the table lacks are passed over.
        row: The column of the table that counts its rows from 0.

    Raises:
        DataError: With the first bad row of the first bad column.
    """
    bad_rows = {}
    for column in columns:
        if column.name not in table.columns or column.kind in ("text", "words", "texts", "vectors"):
            continue
        values = table[column.name]
        if column.kind == "id":
            wrong = values.isnull()
            if values.type().is_unsigned_integer():
                wrong = wrong | (values > 2**63 - 1)
        elif column.kind in ("integer", "time"):
            wrong = values.isnull() | (values < 0)
        elif values.type().is_boolean():
            continue
        elif column.kind == "number":
            wrong = values < 0
        else:
            wrong = ~values.isin([0, 1])
        if values.type().is_floating():
            wrong = wrong | values.isnan() | values.isinf()
        bad_rows[column.name] = table[row].min(where=wrong)
    if not bad_rows:
        return
    found = table.aggregate(**bad_rows).to_pyarrow().to_pylist()[0]
    for column in columns:
        at = found.get(column.name)
        if at is not None:
            value = table.filter(table[row] == at)[column.name].to_pyarrow()[0].as_py()
            raise bad(
                path, f"wanted {_WANTED[column.kind]}, got {value}", column=column.name, row=at
            )
