"""One table of a log: Parquet files and their columns, read under the names of the schema."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec.data.schema import Column, bad, check_columns, check_values, is_text, is_time
from onerec.data.source import Connection
from onerec.errors import OneRecError

UNITS = ("s", "ms", "us", "ns", "iso")
_FIRST = 631_152_000_000  # 1990-01-01 in ms
_PER_MS = {"s": 1e-3, "ms": 1.0, "us": 1e3, "ns": 1e6}
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_DAY = 86_400_000
_WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"  # an integer as a program writes it


@dataclass(frozen=True)
class Table:
    """Parquet files of one schema.

    Attributes:
        path: What messages call the table.
        parts: The files, in order.
        told: What messages call each file.
        schema: Names and types of the columns, those of `keys` last.
        keys: Column that a hive folder gives -> its value in each part (None: null).
        text: Whether the files are made of text without types: every column is a string, and its
            values say what it holds.
        written: Whether the values are somebody's text, whose ISO times need no unit.
    """

    path: Path
    parts: tuple[Path, ...]
    told: tuple[Path, ...]
    schema: pa.Schema
    keys: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    text: bool = False
    written: bool = False

    @property
    def names(self) -> list[str]:
        """The columns, exactly as they are written."""
        return list(self.schema.names)

    def rows(self) -> int:
        """How many rows the footers tell of."""
        return sum(pq.read_metadata(part).num_rows for part in self.parts)

    def place(self, row: int) -> tuple[Path, int]:
        """The file and the row in it (from 0) of a value of the column `row`."""
        return self.told[row // FILE], row % FILE

    def bad(self, problem: str, column: str | None = None, row: int | None = None) -> Exception:
        """A `DataError` at a place of the table."""
        if row is None:
            return bad(self.path, problem, column=column)
        path, at = self.place(row)
        return bad(path, problem, column=column, row=at)


FILE = 2**40  # `row` is the number of the file times this, plus the row in the file


def parquet_table(
    path: Path,
    parts: Sequence[Path],
    keys: Mapping[str, Sequence[str | None]] | None = None,
    *,
    text: bool = False,
    written: bool = False,
    told: Sequence[Path] | None = None,
) -> Table:
    """A table of Parquet files.

    Raises:
        DataError: A file is missing or damaged, has other columns than the first, or hides the
            numbers of its rows.
    """
    told = told or parts
    first: pa.Schema | None = None
    for part, name in zip(parts, told, strict=True):
        schema = _footer(part, name)
        if first is None:
            first = schema
        elif set(schema.names) != set(first.names):
            raise bad(
                name,
                f"wanted the columns of {told[0]} ({', '.join(first.names)}), got "
                f"{', '.join(schema.names)}",
            )
        else:
            first = _promoted(first, schema, name)
    assert first is not None
    hidden = [n for n in first.names if n.lower() in ("file_row_number", "file_index")]
    if hidden:
        raise bad(path, "the engine's own name for rows is taken: rename it", column=hidden[0])
    own = {name: values for name, values in (keys or {}).items() if name not in first.names}
    for key, values in own.items():
        whole = all(value is None or re.fullmatch(_WHOLE, value) for value in values)
        first = first.append(pa.field(key, pa.int64() if whole else pa.string()))
    return Table(path, tuple(parts), tuple(told), first, own, text, written)


def _footer(path: Path, told: Path) -> pa.Schema:
    if not path.is_file():
        raise bad(told, "there is no such file")
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise bad(
            told, f"not a whole Parquet file (cut short or of another format): {error}"
        ) from error


def _promoted(first: pa.Schema, other: pa.Schema, path: Path) -> pa.Schema:
    """The types that hold the values of both files: a part without values has no type."""
    for at, name in enumerate(first.names):
        if first.names.count(name) > 1:
            continue
        ours, theirs = first.field(at).type, other.field(name).type
        if ours == theirs or pa.types.is_null(theirs):
            continue
        if not pa.types.is_null(ours):
            try:
                pa.unify_schemas(
                    [pa.schema([("x", ours)]), pa.schema([("x", theirs)])],
                    promote_options="permissive",
                )
            except pa.ArrowException as error:
                raise bad(
                    path, f"wanted {ours} as in the first file, got {theirs}", column=name
                ) from error
        if pa.types.is_null(ours) or pa.types.is_floating(theirs):
            first = first.set(at, pa.field(name, theirs))
    return first


def read(
    connection: Connection,
    table: Table,
    columns: Mapping[str, Column],
    *,
    unit: str | None = None,
    free: Collection[str] = (),
) -> Any:
    """An Ibis table over a checked table: `row`, and the columns by their keys in `columns`.

    Columns that hold nothing (Arrow's null type) are left out. Times come out as int64 ms.

    Args:
        connection: The engine.
        table: The files.
        columns: Name to read under -> the column of the file; optional ones may be missing.
        unit: Of integers, floats and strings in columns of times: "s", "ms", "us", "ns" or "iso";
            None: integers are ms, and floats and strings are refused.
        free: Columns that may hold anything.

    Raises:
        DataError: A column is missing, of another type, or holds a value that it must not.
    """
    for column in columns.values():
        if table.names.count(column.name) > 1:
            raise table.bad("the column is there twice", column.name)
    here = {
        ours: column
        for ours, column in columns.items()
        if column.name in table.names and not pa.types.is_null(table.schema.field(column.name).type)
    }
    schema = table.schema
    with _reading(table, here):
        found = connection.read_parquet(table, {o: c.name for o, c in here.items()})
        if table.text:
            schema, found = _typed(table, found, here)
        check_columns(
            table.path,
            schema,
            tuple(column for name, column in columns.items() if name not in free),
            any_time=unit is not None or table.written,
        )
        for ours, column in here.items():
            if column.kind == "time":
                type_ = schema.field(column.name).type
                found = _times(connection, table, found, ours, column, type_, unit)
        check_values(table, found, here)
    return found


def _typed(table: Table, found: Any, columns: Mapping[str, Column]) -> tuple[pa.Schema, Any]:
    """Types for columns of strings, by what all of their values are.

    Ids are integers only where each is written as an integer is ("7", not "007"), so that no two
    become one.
    """
    tests = {}
    for ours, column in columns.items():
        values = found[ours]
        if column.kind in ("id", "time", "integer", "number", "flag"):
            tests[f"{ours} int"] = values.re_search(_WHOLE).all()
        if column.kind in ("time", "integer", "number", "flag"):
            tests[f"{ours} float"] = (
                values.try_cast("float64").notnull().all(where=values.notnull())
            )
        if column.kind == "flag":
            tests[f"{ours} bool"] = values.lower().isin(["true", "false"]).all()
    told = found.aggregate(**tests).to_pyarrow().to_pylist()[0] if tests else {}
    types, casts = {}, {}
    for ours, column in columns.items():
        types[column.name] = pa.string()
        if column.kind in ("words", "texts"):
            continue
        for kind, type_, name in (
            ("int", pa.int64(), "int64"),
            ("float", pa.float64(), "float64"),
            ("bool", pa.bool_(), "bool"),
        ):
            if told.get(f"{ours} {kind}", False):
                types[column.name] = type_
                casts[ours] = found[ours].cast(name)
                break
        else:
            if column.kind in ("integer", "number", "flag"):
                values = found[ours]
                wrong = values.notnull() & values.try_cast("float64").isnull()
                row = found.row.min(where=wrong).to_pyarrow().as_py()
                if row is not None:
                    value = found.filter(found.row == row)[ours].to_pyarrow()[0].as_py()
                    raise table.bad(f"wanted numbers, got {value!r}", column.name, row)
    schema = pa.schema([pa.field(n, types.get(n, pa.string())) for n in table.names])
    return schema, found.mutate(**casts)


def _times(
    connection: Connection,
    table: Table,
    found: Any,
    ours: str,
    column: Column,
    type_: pa.DataType,
    unit: str | None,
) -> Any:
    """Times as int64 ms, checked to lie between 1990 and a year from now.

    Integers that lie before and would not in any other unit count from a beginning of their own:
    only their order and distances mean something, and they are taken as they are.
    """
    values = found[ours]
    if is_time(type_):
        return _in_range(
            table, found.mutate(**{ours: connection.milliseconds(values)}), ours, column
        )
    if is_text(type_):
        if unit not in (None, "iso"):
            raise table.bad(f"wanted numbers ({_NAMES[unit]}), got {type_}", column.name)
        parsed = connection.milliseconds(values.try_cast("timestamp"))
        wrong = found.row.min(where=values.notnull() & parsed.isnull()).to_pyarrow().as_py()
        if wrong is not None:
            value = found.filter(found.row == wrong)[ours].to_pyarrow()[0].as_py()
            raise table.bad(
                f"wanted ISO times such as 2024-05-31T12:00:00Z, got {value!r}", column.name, wrong
            )
        return _in_range(table, found.mutate(**{ours: parsed}), ours, column)
    if unit == "iso":
        raise table.bad(f"wanted ISO times (strings), got {type_}", column.name)
    if unit is None and pa.types.is_floating(type_):
        raise table.bad(
            f"wanted integers (ms) or --columns.timestamp_unit, got {type_}", column.name
        )
    check_values(table, found, {ours: column})
    counted = found.aggregate(low=values.min(), high=values.max()).to_pyarrow().to_pylist()[0]
    low, high = counted["low"], counted["high"]
    if low is None:
        return found
    latest = _latest()

    def fits(divisor: float) -> bool:
        return bool(low / divisor >= _FIRST and high / divisor <= latest)

    divisor = _PER_MS[unit or "ms"]
    if not fits(divisor):
        likely = next((name for name, d in _PER_MS.items() if name != unit and fits(d)), None)
        days = fits(1 / _DAY)
        if likely or days or high / divisor >= _FIRST:
            after = high / divisor > latest
            wrong = values / divisor > latest if after else values / divisor < _FIRST
            row = found.row.min(where=wrong).to_pyarrow().as_py()
            value = found.filter(found.row == row)[ours].to_pyarrow()[0].as_py()
            told = "; they look like days since 1970: write dates" if days else ""
            if likely:
                told = f"; as {_NAMES[likely]} all lie there: --columns.timestamp_unit {likely}"
            raise table.bad(
                f"wanted times from 1990 to a year from now in {_NAMES[unit or 'ms']} since 1970, "
                f"got {value}{told}",
                column.name,
                row,
            )
    if divisor == 1.0:
        whole = values.floor().cast("int64") if pa.types.is_floating(type_) else values
    elif divisor < 1:
        whole = (values * 1000).floor().cast("int64")
    elif pa.types.is_floating(type_):
        whole = (values / divisor).floor().cast("int64")
    else:
        whole = values.cast("int64") // int(divisor)
    return found.mutate(**{ours: whole})


def _latest() -> int:
    """A year from now, in ms."""
    now = datetime.datetime.now(datetime.UTC)
    return int(now.timestamp() * 1000) + 366 * _DAY


def _in_range(table: Table, found: Any, ours: str, column: Column) -> Any:
    """Refuses points in time before 1990 or more than a year ahead."""
    check_values(table, found, {ours: column})
    values = found[ours]
    wrong = (values < _FIRST) | (values > _latest())
    row = found.row.min(where=wrong).to_pyarrow().as_py()
    if row is not None:
        value = found.filter(found.row == row)[ours].to_pyarrow()[0].as_py()
        raise table.bad(
            "wanted times from 1990 to a year from now, got "
            f"{np.datetime64(value, 'ms')} (a unit that was taken for another before it became a "
            "time?)",
            column.name,
            row,
        )
    return found


@contextmanager
def _reading(table: Table, columns: Mapping[str, Column]) -> Iterator[None]:
    """Turns DuckDB's complaints about a damaged file into a `DataError`."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise OneRecError(f"{table.path}: memory_limit is too small to read it: {error}") from error
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        for column in columns.values():
            _check_extreme_times(table, column)
        raise bad(table.path, f"the file is damaged: {error}") from error


def _check_extreme_times(table: Table, column: Column) -> None:
    """Finds a time that the engine has no room for."""
    type_ = table.schema.field(column.name).type
    if column.kind != "time" or not pa.types.is_timestamp(type_):
        return
    for number, part in enumerate(table.parts):
        try:
            values = pq.read_table(part, columns=[column.name])[column.name].cast(pa.int64())
        except (pa.ArrowException, OSError):
            return
        per_ms = _PER_MS[type_.unit]
        wrong = pc.or_(
            pc.less(values, int(_FIRST * per_ms)), pc.greater(values, int(_latest() * per_ms))
        )
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise table.bad(
                f"wanted times from 1990 to a year from now, got {values[row]} ({type_.unit} since "
                "1970)",
                column.name,
                number * FILE + row,
            )
