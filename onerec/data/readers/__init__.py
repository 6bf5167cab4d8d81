"""Opens a log in any of the forms that are understood, as expressions in the one schema.

`find` has the files behind a path, `published` known data sets, `table` their columns under the
names of the schema; `own`, `kuairand` and `amazon` make the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onerec.data.readers.amazon import read_amazon
from onerec.data.readers.common import SPLIT
from onerec.data.readers.find import frame_table, is_glob, named, parts_below, table_at
from onerec.data.readers.kuairand import read_kuairand
from onerec.data.readers.own import read_own
from onerec.data.readers.published import convert
from onerec.data.readers.table import UNITS, Table, parquet_table
from onerec.data.schema import INTERACTIONS, ITEMS, REWRITE, bad
from onerec.data.source import Connection, DuckDB, LogSource, Spark

LAYOUTS = ("auto", "kuairand", "amazon", "parquet")
ENGINES = ("duckdb", "spark")
_SCHEMA = (
    *(column.name for column in (*INTERACTIONS, SPLIT)),
    *(f"items.{column.name}" for column in ITEMS),
)


def open_log(
    log: Any,
    *,
    items: Any = None,
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    engine: str = "duckdb",
    memory_limit: str = "2GB",
    threads: int | None = None,
) -> LogSource:
    """Opens a log and checks every value of it that is read.

    Args:
        log: A folder with `interactions` and perhaps `items` (Parquet, CSV or JSON lines, also
            .gz; each a file or a folder of parts, with hive keys or without), one such file, a
            folder of parts, a glob; MovieLens, KuaiRand, Amazon reviews and RecBole's atomic files
            as they are published; a DataFrame of pandas or polars, or an Arrow table.
        items: The items where `log` is a DataFrame: another one.
        kind: "kuairand" (timestamp_ms, play_time_ms, is_like ...; with `train_history.parquet`),
            "amazon" (position and split, no times), "parquet" (the schema of docs/data.md), or
            "auto", which goes by names of files and columns; with `columns`, "parquet".
        columns: For "parquet": column of the schema -> its name in your files, where they have
            another; `items.` stands before columns of the items, e.g.
            {"user_id": "uid", "item_id": "video", "items.item_id": "video"}. "timestamp_unit" is
            the unit of integers, floats or strings: "s", "ms" (default), "us", "ns" or "iso".
        engine: "duckdb" on this machine, or "spark" (extra `spark`): the active Spark session, or a
            local one.
        memory_limit: What DuckDB may hold in memory; the rest is spilled to a temporary folder.
        threads: DuckDB threads; None takes `torch.get_num_threads()`.

    Returns:
        A `LogSource`; close it, or use it in a `with` statement.

    Raises:
        DataError: A file is missing, cut short, or breaks the schema.
        TypeError: `log` is neither a path nor a table.
        ValueError: An unknown `kind`, or `columns` that the schema or the kind does not have.
    """
    if kind not in LAYOUTS:
        raise ValueError(f"kind: wanted one of {', '.join(LAYOUTS)}, got {kind!r}")
    given = dict(columns or {})
    unit = given.pop("timestamp_unit", None)
    if unit not in (None, *UNITS):
        raise ValueError(f"timestamp_unit: wanted one of {', '.join(UNITS)}, got {unit!r}")
    if columns:
        if kind not in ("auto", "parquet"):
            raise ValueError(f"columns: only kind 'parquet' takes other names, got kind {kind!r}")
        kind = "parquet"
        if unknown := [name for name in given if name not in _SCHEMA]:
            wanted = ", ".join([*_SCHEMA, "timestamp_unit"])
            raise ValueError(f"columns: the schema has {wanted}; got {', '.join(unknown)}")
    if engine not in ENGINES:
        raise ValueError(f"engine: wanted one of {', '.join(ENGINES)}, got {engine!r}")
    if items is not None and isinstance(log, str | Path):
        raise ValueError("items: they lie beside the log, got a path of the log and items")
    if isinstance(log, str | Path) and not is_glob(str(log)) and not Path(log).exists():
        raise bad(Path(log), "there is no such folder or file")
    connection: Connection = Spark() if engine == "spark" else DuckDB(memory_limit, threads)
    try:
        return _open(log, items, kind, given, unit, connection)
    except BaseException:
        connection.close()
        raise


def _open(
    log: Any,
    items: Any,
    kind: str,
    given: Mapping[str, str],
    unit: str | None,
    connection: Connection,
) -> LogSource:
    scratch = connection.scratch
    if not isinstance(log, str | Path):
        table = frame_table("interactions", log, scratch)
        about = None if items is None else frame_table("items", items, scratch)
        path, folder = table.path, None
    else:
        path = Path(log)
        folder, table, about, published = _tables(log, scratch)
        if published is not None:
            if published.kind == "kuairand" and not given:
                return read_kuairand(scratch, table, about, connection, path)
            notes = [published.note] if published.note else []
            return read_own(
                folder,
                table,
                about,
                connection,
                path,
                given=given,
                unit=unit or published.unit,
                kind=published.kind,
                notes=notes,
            )
    if not table.rows():
        raise bad(table.path, "the file has no rows")
    if kind == "auto":
        names = set(table.names)
        if {"timestamp_ms", "play_time_ms"} <= names:
            kind = "kuairand"
        elif "position" in names and "timestamp" not in names:
            kind = "amazon"
    if kind == "kuairand":
        return read_kuairand(folder or path, table, about, connection, path)
    if kind == "amazon":
        return read_amazon(folder or path, table, about, connection, path)
    return read_own(folder, table, about, connection, path, given=given, unit=unit)


def _tables(log: str | Path, scratch: Path) -> tuple[Path | None, Table, Table | None, Any]:
    """The folder of vectors, the interactions, the items, and what was published."""
    path = Path(log)
    if is_glob(str(log)):
        return None, table_at(path, scratch, str(log)), None, None
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        main = named(path, "interactions")
    else:
        main = path if path.name.startswith("interactions.") else None
    if main is not None:
        found = named(folder, "items")
        about = None if found is None else table_at(found, scratch)
        return folder, table_at(main, scratch), about, None
    published = convert(path, scratch)
    if published is not None:
        table = scratch / "interactions.parquet"
        made = scratch / "items.parquet"
        text = published.kind == "recbole"
        about = None
        if published.items is not None:
            about = parquet_table(published.items, [made], text=text, told=[published.items])
        file = published.interactions
        return folder, parquet_table(file, [table], text=text, told=[file]), about, published
    # A folder with items or vectors is a log of one's own, no folder of parts.
    beside = [*path.glob("items.*"), *path.glob("embeddings*")] if path.is_dir() else []
    if path.is_dir() and (beside or not parts_below(path)):
        here = ", ".join(sorted(one.name for one in path.glob("[!.]*"))[:8]) or "nothing"
        raise bad(
            path / "interactions.parquet",
            f"there is no such file; the folder has {here} ({REWRITE} tells what is read)",
        )
    return (folder if path.is_dir() else None), table_at(path, scratch), None, None
