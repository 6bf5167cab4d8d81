"""Amazon 2014 in the S3-Rec / P5 numbering: an order without times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onerec.data.readers.common import SPLIT, canonical, check_split, items_table
from onerec.data.readers.table import Table, read
from onerec.data.schema import Column, bad
from onerec.data.source import Connection, LogSource
from onerec.data.vectors import VectorFile


def read_amazon(
    folder: Path, table: Table, items: Table | None, connection: Connection, told: Path
) -> LogSource:
    """Amazon 2014 in the S3-Rec / P5 numbering: order without times, leave-last-out."""
    split = replace(SPLIT, required=True)
    columns = {
        "user_id": Column("user_id", "id", True),
        "item_id": Column("item_id", "id", True),
        "timestamp": Column("position", "integer", True),
        "split": split,
    }
    found = read(connection, table, columns)
    check_split(table, found, "split")
    interactions = canonical(found)
    if items is None:
        raise bad(folder / "items.parquet", "there is no such file")
    about = read(
        connection,
        items,
        {
            "item_id": Column("item_id", "id", True),
            "text": Column("title", "text"),
            "tags": Column("attributes", "texts"),
        },
    )
    if "text" in about.columns:
        about = about.mutate(text=about.text.nullif(""))
    table_items = items_table(items, about)
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
        path=told,
        connection=connection,
        interactions=interactions,
        table=table,
        items=table_items,
        vectors=vectors,
        time="position",
        found={
            "interactions": int(interactions.count().to_pyarrow().as_py()),
            "items": table_items.num_rows,
        },
        default_rule=("next", "the log has an order but no times"),
        default_split="column",
    )
