"""Opens a log in any of the layouts that are understood, as expressions in the one schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onerec.data.schema import (
    INTERACTIONS,
    ITEMS,
    REWRITE,
    Column,
    bad,
    check_columns,
    check_values,
    is_text,
    is_time,
    read_footer,
)
from onerec.data.source import Connection, DuckDB, LogSource, Spark
from onerec.data.vectors import VectorFile
from onerec.errors import OneRecError

LAYOUTS = ("auto", "kuairand", "amazon", "parquet")
ENGINES = ("duckdb", "spark")


def open_log(
    path: str | Path,
    *,
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    engine: str = "duckdb",
    memory_limit: str = "2GB",
    threads: int | None = None,
) -> LogSource:
    """Opens a folder with `interactions.parquet` and checks every file in it.

    Args:
        path: The folder.
        kind: "kuairand" (timestamp_ms, play_time_ms, is_like ...; with `train_history.parquet`),
            "amazon" (position and split, no times), "parquet" (the schema of docs/data.md), or
            "auto", which goes by the columns of `interactions.parquet`; with `columns`, "parquet".
        columns: For "parquet": column of the schema -> its name in your files, where they have
            another; `items.` stands before columns of `items.parquet`, e.g.
            {"user_id": "uid", "item_id": "video", "items.item_id": "video"}. Units stay:
            integers are milliseconds under any name.
        engine: "duckdb" on this machine, or "spark" (extra `spark`): the active Spark session, or a
            local one.
        memory_limit: What DuckDB may hold in memory; the rest is spilled to a temporary folder.
        threads: DuckDB threads; None takes `torch.get_num_threads()`.

    Returns:
        A `LogSource`; close it, or use it in a `with` statement.

    Raises:
        DataError: A file is missing, cut short, or breaks the schema.
        ValueError: An unknown `kind`, or `columns` that the schema or the kind does not have.
    """
    if kind not in LAYOUTS:
        raise ValueError(f"kind: wanted one of {', '.join(LAYOUTS)}, got {kind!r}")
    columns = columns or {}
    if columns:
        if kind not in ("auto", "parquet"):
            raise ValueError(f"columns: only kind 'parquet' takes other names, got kind {kind!r}")
        kind = "parquet"
        if unknown := [name for name in columns if name not in _SCHEMA]:
            wanted = ", ".join(_SCHEMA)
            raise ValueError(f"columns: the schema has {wanted}; got {', '.join(unknown)}")
    folder = Path(path)
    if not folder.is_dir():
        raise bad(folder, "there is no such folder")
    interactions = folder / "interactions.parquet"
    if not interactions.is_file():
        here = ", ".join(sorted(path.name for path in folder.glob("[!.]*"))[:8]) or "nothing"
        raise bad(
            interactions,
            f"there is no such file; the folder has {here} ({REWRITE} makes one of CSV, JSON "
            "lines, many files or other columns)",
        )
    schema, rows = read_footer(interactions)
    if not rows:
        raise bad(interactions, "the file has no rows")
    if kind == "auto":
        names = set(schema.names)
        if {"timestamp_ms", "play_time_ms"} <= names:
            kind = "kuairand"
        elif "position" in names and "timestamp" not in names:
            kind = "amazon"
        else:
            kind = "parquet"
    if engine not in ENGINES:
        raise ValueError(f"engine: wanted one of {', '.join(ENGINES)}, got {engine!r}")
    connection: Connection = Spark() if engine == "spark" else DuckDB(memory_limit, threads)
    try:
        if kind == "kuairand":
            return _kuairand(folder, connection)
        if kind == "amazon":
            return _amazon(folder, connection)
        return _parquet(folder, connection, columns)
    except BaseException:
        connection.close()
        raise


_SPLIT = Column("split", "text")
_SCHEMA = (
    *(column.name for column in (*INTERACTIONS, _SPLIT)),
    *(f"items.{column.name}" for column in ITEMS),
)
_NAMES_KUAIRAND = {
    "user_id": "user_id",
    "item_id": "item_id",
    "timestamp": "timestamp_ms",
    "watch_time_ms": "play_time_ms",
    "duration_ms": "duration_ms",
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "share": "is_forward",
    "comment": "is_comment",
    "hate": "is_hate",
}


def _kuairand(folder: Path, connection: Connection) -> LogSource:
    """KuaiRand (Gao et al., CIKM 2022): full rows, and the earlier exposures as lists."""
    path = folder / "interactions.parquet"
    columns = tuple(
        replace(column, name=_NAMES_KUAIRAND[column.name])
        for column in INTERACTIONS
        if column.name in _NAMES_KUAIRAND
    )
    table = _checked(connection, path, columns)
    names = {ours: theirs for ours, theirs in _NAMES_KUAIRAND.items() if theirs in table.columns}
    rows = int(table.count().to_pyarrow().as_py())
    # An exact repeat of a whole row is a logging artefact (also counted by others on this log).
    every = [name for name in table.columns if name != "file_row_number"]
    table = table.group_by(every).aggregate(row=table.file_row_number.min())
    distinct = int(table.count().to_pyarrow().as_py())
    interactions = _canonical(table, names, table.row)
    if "duration_ms" in interactions.columns:
        interactions = interactions.mutate(duration_ms=interactions.duration_ms.nullif(0))
    found: dict[str, Any] = {"full rows": distinct, "exact repeats dropped": rows - distinct}

    history_path = folder / "train_history.parquet"
    if history_path.exists():
        history = _checked(
            connection,
            history_path,
            (Column("user_id", "id", True), Column("last_timestamp_ms", "integer", True)),
        )
        lists = ("item_ids", "long_view", "is_like")
        for name in lists:
            if name not in history.columns:
                raise bad(history_path, "the column is missing", column=name)
            if not history[name].type().is_array():
                raise bad(history_path, f"wanted lists, got {history[name].type()}", column=name)
        length = history.item_ids.length()
        uneven = history.filter(
            (length != history.long_view.length()) | (length != history.is_like.length())
        ).file_row_number.min()
        at = uneven.to_pyarrow().as_py()
        if at is not None:
            raise bad(
                history_path, "item_ids, long_view and is_like have other lengths", row=int(at)
            )
        import ibis

        history = history.mutate(at=ibis.range(0, length.cast("int64")).unnest())
        earlier = history.select(
            user_id=history.user_id.cast("int64"),
            item_id=history.item_ids[history.at].cast("int64"),
            # Only the last exposure's time is known; the order is, so the others step back by 1 ms.
            timestamp=history.last_timestamp_ms - (history.item_ids.length() - 1 - history.at),
            row=history.at.cast("int64"),
            long_view=history.long_view[history.at].cast("int8"),
            like=history.is_like[history.at].cast("int8"),
        )
        found["earlier exposures"] = int(earlier.count().to_pyarrow().as_py())
        for name in interactions.columns:
            if name not in earlier.columns:
                earlier = earlier.mutate(**{name: ibis.null(interactions[name].type())})
        interactions = interactions.union(earlier.select(interactions.columns))

    items_path = folder / "items.parquet"
    if items_path.exists():
        # A video that the publisher gives no length or tag for keeps nulls.
        items = _checked(connection, items_path, (Column("item_id", "id", True),))
        parts = []
        if "tag" in items.columns:
            parts.append("tag " + items.tag.fill_null("?"))
        if "author_id" in items.columns:
            parts.append("author " + items.author_id.cast("string").fill_null("?"))
        seconds = None
        if "video_duration" in items.columns:
            seconds = items.video_duration.nullif(0).round().cast("int64")
            parts.append(
                ((seconds / 1000).round().cast("int64").cast("string") + " s").fill_null(
                    "length unknown"
                )
            )
        text = parts[0] if parts else "video " + items.item_id.cast("string")
        for part in parts[1:]:
            text = text + " · " + part
        chosen = {"item_id": items.item_id, "row": items.file_row_number, "text": text}
        if "tag" in items.columns:
            chosen["tags"] = items.tag.split(",")
        if seconds is not None:
            chosen["duration_ms"] = seconds
        table_items = _items(items_path, items.select(**chosen))
    else:
        table_items = _items_of(interactions)
    vectors = {}
    for name, about in (
        ("graph64", "graph64 (random walks on the train period, published)"),
        ("twotower64", "twotower64 (two-tower model, published, training not documented)"),
    ):
        file = folder / f"item_embeddings_{name}.npz"
        if file.exists():
            vectors[name] = VectorFile(file, None, about)
    return LogSource(
        kind="kuairand",
        path=folder,
        connection=connection,
        interactions=interactions,
        interactions_path=path,
        items=table_items,
        vectors=vectors,
        time="partial" if history_path.exists() else "ms",
        found=found | {"items": table_items.num_rows},
        default_rule=(
            "next",
            "KuaiRand has no request ids, and its rows are too sparse for time gaps "
            "(only a pool of some thousand videos was published)",
        ),
        # 2022-04-27 and 2022-04-29, 00:00 in Beijing: two days each for valid and test.
        default_cuts=(1650988800000, 1651161600000) if history_path.exists() else None,
    )


def _amazon(folder: Path, connection: Connection) -> LogSource:
    """Amazon 2014 in the S3-Rec / P5 numbering: order without times, leave-last-out."""
    path = folder / "interactions.parquet"
    table = _checked(
        connection,
        path,
        (
            Column("user_id", "id", True),
            Column("item_id", "id", True),
            Column("position", "integer", True),
            replace(_SPLIT, required=True),
        ),
    )
    names = {"user_id": "user_id", "item_id": "item_id", "timestamp": "position", "split": "split"}
    interactions = _canonical(table, names, table.file_row_number)
    _check_split(path, table, "split")
    items_path = folder / "items.parquet"
    items = _checked(
        connection,
        items_path,
        (Column("item_id", "id", True), Column("title", "text"), Column("attributes", "texts")),
    )
    chosen = {"item_id": items.item_id, "row": items.file_row_number}
    if "title" in items.columns:
        chosen["text"] = items.title.nullif("")
    if "attributes" in items.columns:
        chosen["tags"] = items.attributes
    table_items = _items(items_path, items.select(**chosen))
    vectors = {}
    for name, about in (
        ("minilm", "minilm (all-MiniLM-L6-v2 of title, categories and brand)"),
        ("sasrec32", "sasrec32 (published collaborative vectors, training split not stated)"),
    ):
        file = folder / f"item_embeddings_{name}.npy"
        if file.exists():
            vectors[name] = VectorFile(file, table_items["item_id"].to_numpy(), about)
    return LogSource(
        kind="amazon",
        path=folder,
        connection=connection,
        interactions=interactions,
        interactions_path=path,
        items=table_items,
        vectors=vectors,
        time="position",
        found={
            "interactions": int(table.count().to_pyarrow().as_py()),
            "items": table_items.num_rows,
        },
        default_rule=("next", "the log has an order but no times"),
        default_split="column",
    )


def _parquet(folder: Path, connection: Connection, given: Mapping[str, str]) -> LogSource:
    """A folder in the schema of docs/data.md, with some columns under other names."""
    import ibis

    path = folder / "interactions.parquet"
    columns = _named(path, (*INTERACTIONS, _SPLIT), given)
    table = _checked(connection, path, tuple(columns.values()))
    names = {ours: column.name for ours, column in columns.items() if column.name in table.columns}
    if "split" in names:
        _check_split(path, table, names["split"])
    interactions = _canonical(table, names, table.file_row_number)
    time = interactions.timestamp
    counts = interactions.aggregate(rows=time.count(), first=time.min(), last=time.max())
    (counted,) = counts.to_pyarrow().to_pylist()
    items_path = folder / "items.parquet"
    vectors: dict[str, VectorFile] = {}
    item_ids = None
    if items_path.exists() or any(key.startswith("items.") for key in given):
        columns = _named(items_path, ITEMS, given, "items.")
        items = _checked(connection, items_path, tuple(columns.values()))
        vector = columns.pop("embedding", None)
        chosen = {
            ours: items[column.name]
            for ours, column in columns.items()
            if column.name in items.columns
        }
        if "tags" in chosen and chosen["tags"].type().is_string():
            chosen["tags"] = ibis.array([chosen["tags"]]).filter(lambda word: word.notnull())
        table_items = _items(items_path, items.select(**chosen, row=items.file_row_number))
        item_ids = table_items["item_id"].to_numpy()
        if vector is not None and vector.name in items.columns:
            about = f"the column {vector.name} of items.parquet"
            vectors["embedding"] = VectorFile(items_path, item_ids, about, column=vector.name)
    else:
        table_items = _items_of(interactions)
    for file in sorted([*folder.glob("*embeddings*.npy"), *folder.glob("*embeddings*.npz")]):
        vectors[file.stem] = VectorFile(file, item_ids, file.name)
    if "embeddings" in vectors:
        vectors = {"embeddings": vectors.pop("embeddings"), **vectors}
    return LogSource(
        kind="parquet",
        path=folder,
        connection=connection,
        interactions=interactions,
        interactions_path=path,
        items=table_items,
        vectors=vectors,
        time="ms",
        found={
            "interactions": counted["rows"],
            "items": table_items.num_rows,
            "times": f"{_day(counted['first'])} to {_day(counted['last'])}",
        },
        default_split="column" if "split" in names else "time",
    )


def _named(
    path: Path, columns: tuple[Column, ...], given: Mapping[str, str], prefix: str = ""
) -> dict[str, Column]:
    """The columns of the schema that a file has, each under its name in the file.

    A column that was given to one name of the schema is not read under another.
    """
    found = read_footer(path)[0].names
    named = {}
    taken = [given[prefix + column.name] for column in columns if prefix + column.name in given]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise bad(path, "`columns` has it twice", column=twice[0])
    missing = []
    for column in columns:
        key = prefix + column.name
        theirs = given.get(key, column.name)
        if theirs in found and (key in given or theirs not in taken):
            named[column.name] = replace(column, name=theirs)
        elif column.required or key in given:
            missing.append((key, theirs))
    if missing:
        (_, first), *others = missing
        more = "".join(f", and so is {theirs!r}" for _, theirs in others)
        flags = " ".join(f"--columns.{key} NAME" for key, _ in missing)
        raise bad(
            path,
            f"the column is missing{more}; the file has {', '.join(found)}. Under another name: "
            f"{flags} (`columns` of open_log)",
            column=first,
        )
    return named


def _day(milliseconds: int) -> str:
    """The UTC day of a time, also where the unit was another and the year has five digits."""
    return str(np.datetime64(milliseconds, "ms").astype("datetime64[D]"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns DuckDB's complaints about a damaged file into a `DataError`."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise OneRecError(f"{path}: memory_limit is too small to read it: {error}") from error
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        raise bad(path, f"the file is damaged: {error}") from error


def _checked(connection: Connection, path: Path, columns: tuple[Column, ...]) -> Any:
    """An Ibis table over a checked file, without the columns that hold nothing."""
    schema, _ = read_footer(path)
    check_columns(path, schema, columns)
    with _reading(path):
        table = connection.read_parquet(path)
        table = table.drop([field.name for field in schema if pa.types.is_null(field.type)])
        times = [column.name for column in columns if column.kind == "time"]
        times = [
            name for name in times if name in table.columns and is_time(schema.field(name).type)
        ]
        table = table.mutate(**{name: connection.milliseconds(table[name]) for name in times})
        check_values(path, table, columns, "file_row_number")
    return table


def _canonical(table: Any, names: dict[str, str], row: Any) -> Any:
    """Renames to the schema and casts: ids int64 or string, times int64 ms, flags int8."""
    kinds = {column.name: column.kind for column in (*INTERACTIONS, _SPLIT)}
    chosen = {}
    for ours, theirs in names.items():
        values = table[theirs]
        kind = kinds[ours]
        if kind == "id":
            values = values.cast("string" if values.type().is_string() else "int64")
        elif kind == "number":
            values = (values.round() if values.type().is_floating() else values).cast("int64")
        elif kind == "time":
            values = values.cast("int64")
        elif kind == "flag":
            values = values.cast("int8")
        chosen[ours] = values
    return table.select(**chosen, row=row.cast("int64"))


def _check_split(path: Path, table: Any, name: str) -> None:
    split = table[name]
    wrong = table.filter(split.isnull() | ~split.isin(["train", "valid", "test"]))
    at = wrong.file_row_number.min().to_pyarrow().as_py()
    if at is not None:
        value = table.filter(table.file_row_number == at)[name].to_pyarrow()[0].as_py()
        raise bad(path, f"wanted train, valid or test, got {value!r}", column=name, row=at)


def _items(path: Path, expression: Any) -> pa.Table:
    """The items table in the order of the file, ids checked to be distinct."""
    with _reading(path):
        table = expression.order_by("row").to_pyarrow()
    if not table.num_rows:
        raise bad(path, "the file has no rows")
    ids = _ids(table["item_id"])
    _, first = np.unique(ids.to_numpy(zero_copy_only=False), return_index=True)
    if len(first) != len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise bad(path, f"the id {ids[row].as_py()} occurs twice", column="item_id", row=row)
    return _finish(ids, table)


def _items_of(interactions: Any) -> pa.Table:
    """The items table of a log that has none: its item ids in order, with the longest duration."""
    columns = {}
    if "duration_ms" in interactions.columns:
        columns["duration_ms"] = interactions.duration_ms.max()
    table = (
        interactions.group_by("item_id")
        .aggregate(rows=interactions.count(), **columns)
        .order_by("item_id")
        .to_pyarrow()
    )
    return _finish(_ids(table["item_id"]), table)


def _ids(column: pa.ChunkedArray) -> pa.Array:
    values = column.cast(pa.string() if is_text(column.type) else pa.int64()).combine_chunks()
    return values.chunk(0) if isinstance(values, pa.ChunkedArray) else values


def _finish(ids: pa.Array, table: pa.Table) -> pa.Table:
    n = len(ids)
    named = pc.binary_join_element_wise("item", ids.cast(pa.string()), " ")
    text = (
        pc.coalesce(table["text"].cast(pa.string()), named)
        if "text" in table.column_names
        else named
    )
    tags = (
        pc.coalesce(table["tags"].cast(pa.list_(pa.string())), pa.scalar([], pa.list_(pa.string())))
        if "tags" in table.column_names
        else pa.array([[]] * n, pa.list_(pa.string()))
    )
    duration = pa.nulls(n, pa.int64())
    if "duration_ms" in table.column_names:
        duration = pc.round(table["duration_ms"].cast(pa.float64())).cast(pa.int64())
    return pa.table(
        {
            "item_index": pa.array(np.arange(n, dtype=np.int32)),
            "item_id": ids,
            "text": text,
            "tags": tags,
            "duration_ms": duration,
        }
    )
