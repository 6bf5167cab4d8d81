"""A log that was opened: Ibis expressions over its files, on DuckDB or Spark."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.vectors import VectorFile
from onerec.errors import OneRecError

TimeUnit = Literal["ms", "partial", "position"]
Rule = Literal["request", "session", "gap", "next"]
SplitRule = Literal["time", "last", "column"]


class Connection(Protocol):
    """The engine that runs a log's expressions: DuckDB on this machine, or Spark.

    Attributes:
        backend: The Ibis backend.
        scratch: A folder for files that are gone when the connection is closed.
    """

    backend: Any
    scratch: Path

    def read_parquet(self, table: Any, names: Mapping[str, str]) -> Any:
        """An Ibis table over the files of a table.

        Args:
            table: The files, an `onerec.data.readers.table.Table`.
            names: Name of a column to read under -> its name in the files.

        Returns:
            The columns, and `row` int64: the number of the file times 2^40 plus the row in it.
        """
        ...

    def milliseconds(self, times: Any) -> Any:
        """Timestamps or dates as int64 ms since 1970, cut; without a zone they are UTC."""
        ...

    def collect(
        self, values: Any, order: Sequence[Any], *, where: Any = None, include_null: bool = False
    ) -> Any:
        """An aggregate: the values in that order as a list."""
        ...

    def keep(self, name: str, expression: Any) -> Any:
        """An expression's rows, or a pa.Table, as a temporary table in place of an earlier one."""
        ...

    def write_parquet(self, expression: Any, path: Path) -> None:
        """Runs an expression into one Parquet file, rows in its order."""
        ...

    def drop(self, name: str) -> None:
        """Drops a temporary table if there is one."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


class DuckDB:
    """An in-memory DuckDB of our own that spills to a folder of its own.

    Args:
        memory_limit: What DuckDB may hold in memory, e.g. "2GB".
        threads: DuckDB threads; None takes torch's number.
    """

    def __init__(self, memory_limit: str = "2GB", threads: int | None = None) -> None:
        import ibis  # half a second; loaded only where a log is opened
        import torch

        self.scratch = Path(tempfile.mkdtemp(prefix="onerec-duckdb-"))
        self._tables = 0
        self.backend: Any = ibis.duckdb.connect(
            ":memory:",
            memory_limit=memory_limit,
            threads=threads or torch.get_num_threads(),
            temp_directory=str(self.scratch / "spill"),
            preserve_insertion_order=False,
        )

    def read_parquet(self, table: Any, names: Mapping[str, str]) -> Any:
        files = "[" + ", ".join(_text(str(part)) for part in table.parts) + "]"
        source = f"read_parquet({files}, hive_partitioning=false)"
        # DuckDB tells names apart without their case and renames twins: they go by their places.
        theirs = [row[0] for row in self.backend.con.execute(f"DESCRIBE FROM {source}").fetchall()]
        own = [name for name in table.names if name not in table.keys]
        chosen = []
        for name, column in names.items():
            if column in table.keys:
                values = ", ".join(
                    "NULL" if value is None else _text(value) for value in table.keys[column]
                )
                value = f"([{values}])[CAST(file_index AS BIGINT) + 1]"
                if pa.types.is_integer(table.schema.field(column).type):
                    value = f"CAST({value} AS BIGINT)"
            else:
                value = _quoted(theirs[own.index(column)])
            chosen.append(f"{value} AS {_quoted(name)}")
        row = f"CAST(file_index AS BIGINT) * {2**40} + file_row_number AS row"
        self._tables += 1
        view = f"onerec_file_{self._tables}"
        query = f"SELECT {', '.join([*chosen, row])} FROM {source}"
        self.backend.con.execute(f"CREATE TEMP VIEW {view} AS {query}")
        return self.backend.table(view)

    def milliseconds(self, times: Any) -> Any:
        if times.type().is_unknown():  # TIMESTAMPTZ_NS, which neither Ibis nor epoch_us knows
            times = times.cast("timestamp('UTC')")
        return (_builtin("epoch_us")(times) // 1000).cast("int64")  # epoch_ms rounds

    def collect(
        self, values: Any, order: Sequence[Any], *, where: Any = None, include_null: bool = False
    ) -> Any:
        return values.collect(where=where, order_by=order, include_null=include_null)

    def keep(self, name: str, expression: Any) -> Any:
        import ibis

        # Ibis's overwrite=True writes the rows twice, and its drop_table breaks on sqlglot 30.
        self.drop(name)
        if isinstance(expression, pa.Table):
            expression = ibis.memtable(expression)
        return self.backend.create_table(name, expression, temp=True)

    def write_parquet(self, expression: Any, path: Path) -> None:
        self.backend.to_parquet(expression, path, compression="zstd")

    def drop(self, name: str) -> None:
        self.backend.con.execute(f'DROP TABLE IF EXISTS "{name}"')

    def close(self) -> None:
        self.backend.disconnect()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Spark:
    """A Spark session, for logs that one machine cannot hold (extra `spark`; needs Java 17).

    Takes the session that is active, e.g. that of `spark-submit`, else starts a local one.
    """

    def __init__(self) -> None:
        import ibis

        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise OneRecError("engine 'spark' needs pyspark: pip install onerec[spark]") from error
        self.scratch = Path(tempfile.mkdtemp(prefix="onerec-spark-"))
        self._own = SparkSession.getActiveSession() is None
        self._session = SparkSession.builder.appName("onerec").getOrCreate()
        self._session.conf.set("spark.sql.caseSensitive", "true")  # "Like" is not "like"
        self._tables = 0
        self.backend: Any = ibis.pyspark.connect(self._session)

    def read_parquet(self, table: Any, names: Mapping[str, str]) -> Any:
        from pyspark.sql import functions as f

        frames = []
        for number, part in enumerate(table.parts):
            frame = self._session.read.parquet(str(part))
            row = (f.col("_metadata.row_index") + number * 2**40).alias("row")
            columns = [
                f.lit(table.keys[theirs][number])
                .cast("long" if pa.types.is_integer(table.schema.field(theirs).type) else "string")
                .alias(name)
                if theirs in table.keys
                else f.col(f"`{theirs}`").alias(name)
                for name, theirs in names.items()
            ]
            frames.append(frame.select(*columns, row))
        self._tables += 1
        name = f"onerec_file_{self._tables}"
        functools.reduce(lambda a, b: a.union(b), frames).createOrReplaceTempView(name)
        return self.backend.table(name)

    def milliseconds(self, times: Any) -> Any:
        # Ibis has set the session's time zone to UTC, where dates begin and what has no zone lies.
        return _builtin("unix_millis")(times.cast("timestamp('UTC')"))

    def collect(
        self, values: Any, order: Sequence[Any], *, where: Any = None, include_null: bool = False
    ) -> Any:
        import ibis

        if not include_null:
            where = values.notnull() if where is None else where & values.notnull()
        keys = {f"key{i}": key for i, key in enumerate(order)}
        rows = ibis.struct({**keys, "value": values}).collect(where=where)
        return rows.sort().map(lambda row: row["value"])

    def keep(self, name: str, expression: Any) -> Any:
        self.drop(name)
        if isinstance(expression, pa.Table):
            frame = self._session.createDataFrame(expression)
        else:
            frame = self._frame(expression).persist()
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)

    def write_parquet(self, expression: Any, path: Path) -> None:
        batches = self._frame(expression).toArrow()
        pq.write_table(batches, path, compression="zstd")

    def drop(self, name: str) -> None:
        if self._session.catalog.tableExists(name):
            self._session.table(name).unpersist()
            self._session.catalog.dropTempView(name)

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._own:
            self._session.stop()

    def _frame(self, expression: Any) -> Any:
        return self._session.sql(self.backend.compile(expression))


def _text(value: str) -> str:
    """A string in SQL."""
    return "'" + value.replace("'", "''") + "'"


def _quoted(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _builtin(name: str) -> Any:
    """A function of the engine from times to integers, which Ibis has no name for."""
    import ibis

    def declared(times) -> int:  # type: ignore[no-untyped-def,empty-body]
        ...

    return ibis.udf.scalar.builtin(declared, name=name)


@dataclass
class LogSource:
    """A log in the canonical schema. Close it, or use it in a `with` statement.

    Args:
        kind: "kuairand", "amazon", "movielens" or "parquet".
        path: The folder, the file or the glob.
        connection: Owns the expressions below.
        interactions: Ibis table: user_id, item_id, timestamp int64, row int64 (order among equal
            timestamps) and the optional columns of the schema that the log has.
        table: The files behind them, which messages name.
        items: pa.Table: item_index int32 (= row), item_id, text, tags, duration_ms.
        vectors: Item vectors by name; the first is the default.
        time: "ms" (UTC), "partial" (order is known everywhere, the hour only in part) or
            "position" (0, 1, ... per user).
        found: What was counted on opening, for the funnel.
        default_rule: The session rule that "auto" takes, with the reason; None lets the log's
            columns decide.
        default_split: What `split="auto"` takes.
        split_column: Whether interactions has a column `split` (train, valid, test).
        default_cuts: (valid, test) cut times in ms of this log.
        notes: What somebody should know of how the log was read, a line each.
    """

    kind: str
    path: Path
    connection: Connection
    interactions: Any
    table: Any
    items: pa.Table
    vectors: dict[str, VectorFile]
    time: TimeUnit
    found: dict[str, Any] = field(default_factory=dict)
    default_rule: tuple[Rule, str] | None = None
    default_split: SplitRule = "time"
    default_cuts: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line: the kind, where the data set is a known one, and what was found."""
        parts = [
            f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"
            for name, value in self.found.items()
        ]
        vectors = ", ".join(self.vectors) or "none (co-occurrence will be used)"
        # The kind "parquet" is any log in the schema, which may as well lie in CSV or JSON lines.
        kind = "" if self.kind == "parquet" else f"{self.kind} "
        return f"{kind}log at {self.path}: {', '.join(parts)}; item vectors: {vectors}"

    def close(self) -> None:
        """Closes the connection; the expressions are of no use afterwards."""
        self.connection.close()

    def __enter__(self) -> LogSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
