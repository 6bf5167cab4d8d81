"""The one schema of logs and items, and the checks that refuse a bad file.

A message names the file, the column, the row (counted from 0), what was wanted and what came.
docs/data.md lists the columns for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from onerec.errors import DataError

Kind = Literal["id", "time", "integer", "number", "flag", "text", "words", "texts", "vectors"]

_WANTED: dict[Kind, str] = {
    "id": "integers below 2^63 or strings, never null",
    "time": "integers of 0 or more (ms since 1970), timestamps or dates, never null",
    "integer": "integers of 0 or more, never null",
    "number": "numbers of 0 or more and at most 10^12 (null where unknown)",
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


def check_columns(
    path: Path, schema: pa.Schema, columns: tuple[Column, ...], *, any_time: bool = False
) -> None:
    """Checks that a file has the required columns and that known columns have a right type.

    An optional column without any value may have Arrow's null type. With `any_time` times may
    also be floats and strings, whose unit somebody named.

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
        if any_time and column.kind == "time" and (pa.types.is_floating(type_) or is_text(type_)):
            continue
        if not _fits(column.kind, type_):
            raise bad(
                path,
                f"wanted {_WANTED[column.kind]}, got {type_} ({REWRITE} shows how to rewrite it)",
                column=column.name,
            )


MOST = 10**12  # of lengths and watch times, in ms: 31 years, so that sums fit


def check_values(table: Any, found: Any, columns: Mapping[str, Column]) -> None:
    """Checks the values of a table in one pass: nulls, negative numbers, NaN, flags beyond 0/1.

    Args:
        table: The `Table`, which makes messages.
        found: An Ibis table over it with the column `row`.
        columns: Name in `found` -> what to check.

    Raises:
        DataError: With the first bad row of the first bad column.
    """
    bad_rows = {}
    for name, column in columns.items():
        if column.kind in ("text", "words", "texts", "vectors"):
            continue
        values = found[name]
        if column.kind == "id":
            wrong = values.isnull()
            if values.type().is_unsigned_integer():
                wrong = wrong | (values > 2**63 - 1)
        elif column.kind in ("integer", "time"):
            wrong = values.isnull()
            if not values.type().is_string():
                wrong = wrong | (values < 0)
        elif values.type().is_boolean():
            continue
        elif column.kind == "number":
            wrong = (values < 0) | (values > MOST)
        else:
            wrong = ~values.isin([0, 1])
        if values.type().is_floating():
            wrong = wrong | values.isnan() | values.isinf()
        bad_rows[name] = found.row.min(where=wrong)
    if not bad_rows:
        return
    rows = found.aggregate(**bad_rows).to_pyarrow().to_pylist()[0]
    for name, column in columns.items():
        at = rows.get(name)
        if at is not None:
            value = found.filter(found.row == at)[name].to_pyarrow()[0].as_py()
            raise table.bad(f"wanted {_WANTED[column.kind]}, got {value}", column.name, at)
