"""KuaiRand: in the layout of docs/data.md, which the published CSV files become as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from onerec.data.readers.common import canonical, items_of, items_table
from onerec.data.readers.table import Table, parquet_table, read
from onerec.data.schema import INTERACTIONS, Column
from onerec.data.source import Connection, LogSource
from onerec.data.vectors import VectorFile

_NAMES = {
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


def read_kuairand(
    folder: Path, table: Table, items: Table | None, connection: Connection, told: Path
) -> LogSource:
    """KuaiRand (Gao et al., CIKM 2022): full rows, and the earlier exposures as lists."""
    columns = {
        column.name: replace(column, name=_NAMES[column.name])
        for column in INTERACTIONS
        if column.name in _NAMES
    }
    # Every column is read, for an exact repeat of a whole row is a logging artefact (also counted
    # by others on this log).
    ours = {column.name: name for name, column in columns.items()}
    others = {f"other {name}": Column(name, "text") for name in table.names if name not in ours}
    found_rows = read(connection, table, {**columns, **others}, free=others)
    rows = int(found_rows.count().to_pyarrow().as_py())
    every = [name for name in found_rows.columns if name != "row"]
    distinct_rows = found_rows.group_by(every).aggregate(row=found_rows.row.min())
    distinct = int(distinct_rows.count().to_pyarrow().as_py())
    known = [name for name in columns if name in distinct_rows.columns]
    interactions = canonical(distinct_rows.select(*known, "row"))
    if "duration_ms" in interactions.columns:
        interactions = interactions.mutate(duration_ms=interactions.duration_ms.nullif(0))
    found: dict[str, Any] = {"full rows": distinct, "exact repeats dropped": rows - distinct}

    history_path = folder / "train_history.parquet"
    if history_path.exists():
        lists = ("item_ids", "long_view", "is_like")
        past = parquet_table(history_path, [history_path])
        for name in lists:
            if name not in past.names:
                raise past.bad("the column is missing", name)
            if not pa.types.is_list(past.schema.field(name).type):
                raise past.bad(f"wanted lists, got {past.schema.field(name).type}", name)
        history = read(
            connection,
            past,
            {
                "user_id": Column("user_id", "id", True),
                "last_timestamp_ms": Column("last_timestamp_ms", "time", True),
                **{name: Column(name, "texts") for name in lists},
            },
            free=lists,
        )
        length = history.item_ids.length()
        uneven = history.filter(
            (length != history.long_view.length()) | (length != history.is_like.length())
        ).row.min()
        at = uneven.to_pyarrow().as_py()
        if at is not None:
            raise past.bad("item_ids, long_view and is_like have other lengths", row=int(at))
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

    if items is not None:
        # A video that the publisher gives no length or tag for keeps nulls.
        given = {name: Column(name, "text") for name in ("tag", "author_id", "video_duration")}
        about = read(
            connection, items, {"item_id": Column("item_id", "id", True), **given}, free=given
        )
        parts = []
        if "tag" in about.columns:
            parts.append("tag " + about.tag.fill_null("?"))
        if "author_id" in about.columns:
            parts.append("author " + about.author_id.cast("string").fill_null("?"))
        seconds = None
        if "video_duration" in about.columns:
            seconds = about.video_duration.nullif(0).round().cast("int64")
            parts.append(
                ((seconds / 1000).round().cast("int64").cast("string") + " s").fill_null(
                    "length unknown"
                )
            )
        text = parts[0] if parts else "video " + about.item_id.cast("string")
        for part in parts[1:]:
            text = text + " · " + part
        chosen = {"item_id": about.item_id, "row": about.row, "text": text}
        if "tag" in about.columns:
            chosen["tags"] = about.tag.split(",")
        if seconds is not None:
            chosen["duration_ms"] = seconds
        table_items = items_table(items, about.select(**chosen))
    else:
        table_items = items_of(interactions)
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
        path=told,
        connection=connection,
        interactions=interactions,
        table=table,
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
