"""What the readers share: the schema's types, and the items table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onerec.data.readers.table import Table
from onerec.data.schema import INTERACTIONS, Column, bad, is_text

SPLIT = Column("split", "text")


def canonical(table: Any) -> Any:
    """Casts to the schema: ids int64 or string, times and numbers int64, flags int8."""
    kinds = {column.name: column.kind for column in (*INTERACTIONS, SPLIT)}
    chosen = {}
    for name in table.columns:
        values, kind = table[name], kinds.get(name)
        if kind == "id":
            values = values.cast("string" if values.type().is_string() else "int64")
        elif kind == "number":
            values = (values.round() if values.type().is_floating() else values).cast("int64")
        elif kind == "time":
            values = values.cast("int64")
        elif kind == "flag":
            values = values.cast("int8")
        chosen[name] = values
    return table.select(**chosen)


def check_split(table: Table, found: Any, column: str) -> None:
    """Refuses a `split` other than train, valid and test.

    Raises:
        DataError: With the first such row.
    """
    split = found.split
    wrong = found.filter(split.isnull() | ~split.isin(["train", "valid", "test"]))
    at = wrong.row.min().to_pyarrow().as_py()
    if at is not None:
        value = found.filter(found.row == at).split.to_pyarrow()[0].as_py()
        raise table.bad(f"wanted train, valid or test, got {value!r}", column, at)


def items_table(table: Table, found: Any, column: str = "item_id") -> pa.Table:
    """The items table in the order of the file, ids checked to be distinct.

    Raises:
        DataError: There are no rows, or an id occurs twice.
    """
    rows = found.order_by("row").to_pyarrow()
    if not rows.num_rows:
        raise bad(table.path, "the file has no rows")
    ids = _ids(rows["item_id"])
    _, first = np.unique(ids.to_numpy(zero_copy_only=False), return_index=True)
    if len(first) != len(ids):
        at = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise table.bad(f"the id {ids[at].as_py()} occurs twice", column, rows["row"][at].as_py())
    return _finish(ids, rows)


def items_of(interactions: Any) -> pa.Table:
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
    if pc.list_flatten(tags).null_count:
        tags = pa.array([[t for t in row if t is not None] for row in tags.to_pylist()], tags.type)
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
