"""Public data sets as they are published, made tables of the schema (or of the KuaiRand layout).

Each is recognized by the names of its files. Ratings are not read: a rated item counts as taken.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.readers.find import copy, format_of, sql
from onerec.data.schema import bad


@dataclass(frozen=True)
class Published:
    """A set that was recognized and converted.

    Attributes:
        kind: "movielens", "kuairand", "amazon-reviews" or "recbole".
        interactions: The file that messages name.
        items: The same of the items; None without any.
        unit: Of the times, where the schema's is not used.
        note: What was left out.
    """

    kind: str
    interactions: Path
    items: Path | None = None
    unit: str | None = None
    note: str = ""


def convert(path: Path, scratch: Path) -> Published | None:
    """Writes interactions.parquet and items.parquet of a known set to `scratch`; None: unknown.

    Args:
        path: A folder, or the file of the interactions.
        scratch: Where the tables are written.

    Raises:
        DataError: A file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    for one in (_movielens, _kuairand, _recbole, _amazon):
        found = one(path, folder, scratch)
        if found is not None:
            return found
    return None


def _first(path: Path, folder: Path, *patterns: str) -> Path | None:
    """The file of one of these names: `path` itself, or of a folder the first in it."""
    if path.is_file():
        return path if any(path.match(pattern) for pattern in patterns) else None
    return next((file for pattern in patterns for file in sorted(folder.glob(pattern))), None)


def _movielens(path: Path, folder: Path, scratch: Path) -> Published | None:
    layouts = (
        ("u.data", "delim='\\t', header=false", "u.item", "delim='|', header=false"),
        ("ratings.dat", "delim='::', header=false", "movies.dat", "delim='::', header=false"),
        ("ratings.csv", "header=true", "movies.csv", "header=true"),
    )
    for ratings, how, movies, how_items in layouts:
        file = _first(path, folder, ratings)
        if file is None:
            continue
        items = folder / movies
        if ratings == "ratings.csv":
            header = _line(file).strip()
            if header != "userId,movieId,rating,timestamp":
                continue
        with duckdb.connect() as database:
            names = "names=['user', 'item', 'rating', 'time_s']"
            copy(
                database,
                file,
                'SELECT "user"::BIGINT AS user_id, item::BIGINT AS item_id, '
                f"time_s::BIGINT * 1000 AS timestamp FROM read_csv({sql(file)}, {how}, {names}, "
                "all_varchar=true)",
                scratch / "interactions.parquet",
            )
            if items.is_file():
                encoding = "utf-8" if ratings == "ratings.csv" else "latin-1"
                source = (
                    f"read_csv({sql(items)}, {how_items}, all_varchar=true, encoding='{encoding}', "
                    "quote='\"')"
                )
                if ratings != "ratings.csv":
                    source = source.replace("quote='\"'", "quote=''")
                columns = [row[0] for row in database.execute(f"DESCRIBE FROM {source}").fetchall()]
                quoted = [f'"{name}"' for name in columns]
                if ratings == "u.data":
                    flags = ", ".join(
                        f"CASE WHEN {name} = '1' THEN {sql(genre)} END"
                        for name, genre in zip(quoted[5:], _GENRES, strict=True)
                    )
                    tags = f"list_filter([{flags}], lambda g: g IS NOT NULL)"
                else:
                    tags = f"string_split({quoted[2]}, '|')"
                copy(
                    database,
                    items,
                    f"SELECT {quoted[0]}::BIGINT AS item_id, {quoted[1]} AS text, {tags} AS tags "
                    f"FROM {source}",
                    scratch / "items.parquet",
                )
        return Published("movielens", file, items if items.is_file() else None, note=_RATINGS)
    return None


_RATINGS = "not read: rating; every rated item counts as taken"
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def _kuairand(path: Path, folder: Path, scratch: Path) -> Published | None:
    if not path.is_dir():
        return None
    for place in (folder, folder / "data"):
        logs = sorted(place.glob("log_standard_*.csv")) if place.is_dir() else []
        if not logs:
            continue
        files = "[" + ", ".join(sql(log) for log in logs) + "]"
        with duckdb.connect() as database:
            copy(
                database,
                logs[0],
                f"SELECT * RENAME (video_id AS item_id, time_ms AS timestamp_ms) FROM "
                f"read_csv({files}, header=true, sample_size=-1)",
                scratch / "interactions.parquet",
            )
            items = next(iter(sorted(place.glob("video_features_basic*.csv"))), None)
            if items is not None:
                copy(
                    database,
                    items,
                    "SELECT * REPLACE (CAST(tag AS VARCHAR) AS tag) RENAME (video_id AS item_id) "
                    f"FROM read_csv({sql(items)}, header=true, sample_size=-1)",
                    scratch / "items.parquet",
                )
        note = "log_random_*.csv is left out: what was shown at random is no request"
        return Published(
            "kuairand", logs[0], items, note=note if list(place.glob("log_random*")) else ""
        )
    return None


def _recbole(path: Path, folder: Path, scratch: Path) -> Published | None:
    """RecBole's atomic files: tabs, and a type behind each name (user_id:token)."""
    file = _first(path, folder, "*.inter")
    if file is None:
        return None
    with duckdb.connect() as database:
        options = "delim='\\t', header=true, all_varchar=true, quote=''"
        source = f"read_csv({sql(file)}, {options})"
        names = _atomic(database, file, source)
        for wanted in ("user_id", "item_id", "timestamp"):
            if wanted not in names:
                raise bad(
                    file, f"the column is missing; the file has {', '.join(names)}", column=wanted
                )
        chosen = ", ".join(f'"{theirs}" AS "{name}"' for name, theirs in names.items())
        copy(database, file, f"SELECT {chosen} FROM {source}", scratch / "interactions.parquet")
        items = file.with_suffix(".item")
        if items.is_file():
            source = f"read_csv({sql(items)}, {options})"
            names = _atomic(database, items, source)
            if "item_id" not in names:
                raise bad(
                    items,
                    f"the column is missing; the file has {', '.join(names)}",
                    column="item_id",
                )
            text = next(
                (n for n in names if "title" in n), next((n for n in names if "name" in n), None)
            )
            tags = next((n for n in names if re.search("class|genre|categor|tag", n)), None)
            chosen = f'"{names["item_id"]}" AS item_id'
            if text:
                chosen += f', "{names[text]}" AS text'
            if tags:
                words = f"string_split(\"{names[tags]}\", ' ')"
                chosen += f", list_filter({words}, lambda w: w <> '') AS tags"
            copy(database, items, f"SELECT {chosen} FROM {source}", scratch / "items.parquet")
    return Published("recbole", file, items if items.is_file() else None, unit="s")


def _atomic(database: Any, path: Path, source: str) -> dict[str, str]:
    """Name without its type -> name in the file."""
    try:
        columns = [row[0] for row in database.execute(f"DESCRIBE FROM {source}").fetchall()]
    except duckdb.Error as error:
        raise bad(path, f"it cannot be read: {str(error).splitlines()[0]}") from error
    return {name.split(":")[0]: name for name in columns}


def _amazon(path: Path, folder: Path, scratch: Path) -> Published | None:
    """Amazon reviews of 2014, 2018 and 2023: JSON lines of reviews, or CSV files of ratings."""
    if path.is_file():
        files = [path]
    else:
        endings = ("*.json.gz", "*.jsonl.gz", "*.json", "*.jsonl", "*.csv", "*.csv.gz")
        files = [file for ending in endings for file in sorted(folder.glob(ending))]
    file = next((file for file in files if not file.name.startswith("meta_")), None)
    if file is None or format_of(file) not in ("json", "csv"):
        return None
    line = _line(file)
    with duckdb.connect() as database:
        if format_of(file) == "json":
            try:
                keys = set(json.loads(line))
            except ValueError:
                return None
            if {"reviewerID", "asin", "unixReviewTime"} <= keys:
                columns = "{'reviewerID': 'VARCHAR', 'asin': 'VARCHAR', 'unixReviewTime': 'BIGINT'}"
                chosen = (
                    "reviewerID AS user_id, asin AS item_id, unixReviewTime * 1000 AS timestamp"
                )
            elif {"user_id", "parent_asin", "timestamp"} <= keys:
                columns = "{'user_id': 'VARCHAR', 'parent_asin': 'VARCHAR', 'timestamp': 'BIGINT'}"
                chosen = "user_id, parent_asin AS item_id, timestamp"
            else:
                return None
            source = f"read_json({sql(file)}, format='newline_delimited', columns={columns})"
        else:
            words = line.strip().split(",")
            if words[:4] == ["user_id", "parent_asin", "rating", "timestamp"]:
                source = f"read_csv({sql(file)}, header=true, all_varchar=true)"
                chosen = "user_id, parent_asin AS item_id, timestamp::BIGINT AS timestamp"
            elif len(words) == 4 and any(_USER.match(word) for word in words[:2]):
                # The release of 2014 begins with the user, that of 2018 with the item.
                at = 0 if _USER.match(words[0]) else 1
                source = (
                    f"read_csv({sql(file)}, header=false, all_varchar=true, "
                    f"names=['a', 'b', 'rating', 'time_s'])"
                )
                chosen = f"{'ab'[at]} AS user_id, {'ba'[at]} AS item_id, "
                chosen += "time_s::BIGINT * 1000 AS timestamp"
            else:
                return None
        copy(database, file, f"SELECT {chosen} FROM {source}", scratch / "interactions.parquet")
        metas = sorted(folder.glob("meta_*.json*"))
        if metas:
            known = set()
            rows: dict[str, list[Any]] = {"item_id": [], "text": [], "tags": []}
            taken = pq.read_table(scratch / "interactions.parquet", columns=["item_id"])
            wanted = set(taken["item_id"].unique().to_pylist())
            for one in _objects(metas[0]):
                item = one.get("parent_asin") or one.get("asin")
                if item in wanted and item not in known:
                    known.add(item)
                    rows["item_id"].append(item)
                    rows["text"].append(one.get("title") or None)
                    tags = one.get("categories") or one.get("category") or []
                    flat = [t for tag in tags for t in (tag if isinstance(tag, list) else [tag])]
                    rows["tags"].append([*dict.fromkeys(flat)])
            for item in sorted(wanted - known):
                rows["item_id"].append(item)
                rows["text"].append(None)
                rows["tags"].append([])
            types = {"item_id": pa.string(), "text": pa.string(), "tags": pa.list_(pa.string())}
            pq.write_table(pa.table(rows, schema=pa.schema(types)), scratch / "items.parquet")
    return Published("amazon-reviews", file, metas[0] if metas else None, note=_RATINGS)


_USER = re.compile(r"^A[0-9A-Z]{10,}$")


def _open(path: Path) -> Any:
    return (
        gzip.open(path, "rt", encoding="utf-8", errors="replace")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", errors="replace")
    )


def _line(path: Path) -> str:
    try:
        with _open(path) as file:
            return str(file.readline())
    except OSError as error:
        raise bad(path, f"it cannot be read: {error}") from error


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, or of the Python literals that the release of 2014 has."""
    with _open(path) as file:
        for number, line in enumerate(file):
            try:
                yield json.loads(line)
            except ValueError:
                try:
                    yield ast.literal_eval(line)
                except (ValueError, SyntaxError) as error:
                    raise bad(path, f"neither JSON nor a literal: {error}", row=number) from error
