"""A log of one's own, in the schema of docs/data.md."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from onerec.data.readers.common import SPLIT, canonical, check_split, items_of, items_table
from onerec.data.readers.table import Table, read
from onerec.data.schema import FLAGS, INTERACTIONS, ITEMS, Column, bad, check_columns
from onerec.data.source import Connection, LogSource
from onerec.data.vectors import VectorFile


def read_own(
    folder: Path | None,
    table: Table,
    items: Table | None,
    connection: Connection,
    told: Path,
    *,
    given: Mapping[str, str],
    unit: str | None = None,
    kind: str = "parquet",
    notes: Sequence[str] = (),
) -> LogSource:
    """A log in the schema of docs/data.md, with some columns under other names.

    Args:
        folder: Where vector files lie; None: there are none.
        table: The interactions.
        items: The items; None takes them from the log.
        connection: The engine.
        told: What messages call the log.
        given: Column of the schema -> its name in the files.
        unit: Of the times, as of `table.read`.
        kind: What the log is called.
        notes: What was already found out about it.
    """
    import ibis

    columns = _named(table, (*INTERACTIONS, SPLIT), given)
    found = read(connection, table, columns, unit=unit)
    if "split" in found.columns:
        check_split(table, found, columns["split"].name)
    interactions = canonical(found)
    time = interactions.timestamp
    counts = interactions.aggregate(rows=time.count(), first=time.min(), last=time.max())
    (counted,) = counts.to_pyarrow().to_pylist()
    vectors: dict[str, VectorFile] = {}
    item_ids = None
    if items is None and any(key.startswith("items.") for key in given):
        raise bad((folder or told) / "items.parquet", "there is no such file")
    if items is not None:
        columns_of_items = _named(items, ITEMS, given, "items.")
        vector = columns_of_items.pop("embedding", None)
        about = read(connection, items, columns_of_items)
        if "tags" in about.columns and about.tags.type().is_string():
            about = about.mutate(tags=ibis.array([about.tags]).filter(lambda word: word.notnull()))
        name = columns_of_items["item_id"].name
        table_items = items_table(items, about, name)
        item_ids = table_items["item_id"].to_numpy()
        if vector is not None and not pa.types.is_null(items.schema.field(vector.name).type):
            check_columns(items.path, items.schema, (vector,))
            source = f"the column {vector.name} of {items.path.name}"
            vectors["embedding"] = VectorFile(
                items.path, item_ids, source, column=vector.name, parts=items.parts
            )
    else:
        table_items = items_of(interactions)
    if folder is not None:
        for file in sorted([*folder.glob("*embeddings*.npy"), *folder.glob("*embeddings*.npz")]):
            vectors[file.stem] = VectorFile(file, item_ids, file.name)
    if "embeddings" in vectors:
        vectors = {"embeddings": vectors.pop("embeddings"), **vectors}
    return LogSource(
        kind=kind,
        path=told,
        connection=connection,
        interactions=interactions,
        table=table,
        items=table_items,
        vectors=vectors,
        time="ms",
        found={
            "interactions": counted["rows"],
            "items": table_items.num_rows,
            "times": f"{_day(counted['first'])} to {_day(counted['last'])}",
        },
        default_split="column" if "split" in interactions.columns else "time",
        notes=[*notes, *_unread(table, columns, interactions.columns)],
    )


def _unread(table: Table, columns: Mapping[str, Column], here: Sequence[str]) -> list[str]:
    """One line on the columns that nobody reads, with near names of the schema; none if all are."""
    read_names = {column.name for column in columns.values()}
    rest = [name for name in table.names if name not in read_names]
    if not rest:
        return []
    near = []
    free = [column.name for column in (*INTERACTIONS, SPLIT) if column.name not in columns]
    for name in rest:
        found = _near(name, free)
        if found is not None:
            near.append(f"{name}: did you mean {found}? (--columns.{found} {name})")
    told = f"not read: {', '.join(rest)}"
    if not {"watch_time_ms", *FLAGS} & set(here):
        told += "; no feedback column: every row counts as taken"
    return ["; ".join([told, *near])]


def _near(name: str, free: Sequence[str]) -> str | None:
    """The name of the schema that another one is likely to mean."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    for ours in free:
        other = re.sub(r"[^a-z]", "", ours)
        stems = {
            other,
            other.removesuffix("ms"),
            f"is{other}",
            f"{other}s",
            f"{other}d",
            f"{other}ed",
        }
        if plain in stems:
            return ours
    close = difflib.get_close_matches(name.lower(), free, n=1, cutoff=0.8)
    return close[0] if close else None


def _named(
    table: Table, columns: tuple[Column, ...], given: Mapping[str, str], prefix: str = ""
) -> dict[str, Column]:
    """The columns of the schema that a file has, each under its name in the file.

    A column that was given to one name of the schema is not read under another.
    """
    found = table.names
    named = {}
    taken = [given[prefix + column.name] for column in columns if prefix + column.name in given]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise table.bad("`columns` has it twice", twice[0])
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
        raise table.bad(
            f"the column is missing{more}; the file has {', '.join(found)}. Under another name: "
            f"{flags} (`columns` of open_log)",
            first,
        )
    return named


def _day(milliseconds: int) -> str:
    """The UTC day of a time, also where the unit was another and the year has five digits."""
    return str(np.datetime64(milliseconds, "ms").astype("datetime64[D]"))
