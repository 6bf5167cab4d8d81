"""A log that was opened: Ibis expressions over its files on a DuckDB connection of our own."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa

from onerec.data.vectors import VectorFile

TimeUnit = Literal["ms", "partial", "position"]
Rule = Literal["request", "session", "gap", "next"]
SplitRule = Literal["time", "last", "column"]


class Connection:
    """An Ibis backend on an in-memory DuckDB that spills to a folder of its own.

    Args:
        memory_limit: What DuckDB may hold in memory, e.g. "2GB".
        threads: DuckDB threads; None takes torch's number.
    """

    def __init__(self, memory_limit: str = "2GB", threads: int | None = None) -> None:
        import ibis  # half a second; loaded only where a log is opened
        import torch

        self._spill = tempfile.mkdtemp(prefix="onerec-duckdb-")
        self.backend: Any = ibis.duckdb.connect(
            ":memory:",
            memory_limit=memory_limit,
            threads=threads or torch.get_num_threads(),
            temp_directory=self._spill,
            preserve_insertion_order=False,
        )

    def read_parquet(self, path: Path) -> Any:
        """An Ibis table over a Parquet file, with `file_row_number` (from 0)."""
        return self.backend.read_parquet(str(path), file_row_number=True)

    def keep(self, name: str, expression: Any) -> Any:
        """Runs an expression into a temporary table of that name, in place of an earlier one."""
        # Ibis's overwrite=True writes the rows twice, and its drop_table breaks on sqlglot 30.
        self.drop(name)
        return self.backend.create_table(name, expression, temp=True)

    def drop(self, name: str) -> None:
        """Drops a temporary table if there is one."""
        self.backend.con.execute(f'DROP TABLE IF EXISTS "{name}"')

    def close(self) -> None:
        """Closes DuckDB and removes what it spilled."""
        self.backend.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)


@dataclass
class LogSource:
    """A log in the canonical schema. Close it, or use it in a `with` statement.

    Args:
        kind: "kuairand", "amazon" or "parquet".
        path: The folder.
        connection: Owns the expressions below.
        interactions: Ibis table: user_id, item_id, timestamp int64, row int64 (order among equal
            timestamps) and the optional columns of the schema that the log has.
        interactions_path: The file named in messages about unknown items.
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
    """

    kind: str
    path: Path
    connection: Connection
    interactions: Any
    interactions_path: Path
    items: pa.Table
    vectors: dict[str, VectorFile]
    time: TimeUnit
    found: dict[str, Any] = field(default_factory=dict)
    default_rule: tuple[Rule, str] | None = None
    default_split: SplitRule = "time"
    default_cuts: tuple[int, int] | None = None

    def describe(self) -> str:
        """One line: the kind and what was found."""
        parts = [
            f"{value:,} {name}" for name, value in self.found.items() if isinstance(value, int)
        ]
        vectors = ", ".join(self.vectors) or "none (co-occurrence will be used)"
        return f"{self.kind} log at {self.path}: {', '.join(parts)}; item vectors: {vectors}"

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
