"""The files behind a path, a glob or a DataFrame, as Parquet tables."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.readers.table import Table, parquet_table
from onerec.data.schema import bad

_FORMATS = {
    "parquet": "parquet",
    "pq": "parquet",
    "csv": "csv",
    "tsv": "csv",
    "txt": "csv",
    "inter": "csv",
    "item": "csv",
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
}
_ENDING = re.compile(rf"\.({'|'.join(_FORMATS)})(\.gz|\.zst)?$", re.IGNORECASE)


def format_of(path: Path) -> str | None:
    """ "parquet", "csv" or "json" by a file's ending (before .gz and .zst); None: another."""
    found = _ENDING.search(path.name)
    return _FORMATS[found[1].lower()] if found else None


def ending(path: Path) -> str:
    """The part of a file's name by which its format is known, such as ".csv.gz"; "" for none."""
    found = _ENDING.search(path.name)
    return found[0] if found else ""


def named(folder: Path, name: str) -> Path | None:
    """The file or folder of a table: `name` with any ending that is read, or without one.

    Raises:
        DataError: There are several.
    """
    found = [
        path
        for path in sorted(folder.iterdir())
        if (_ENDING.sub("", path.name) == name and format_of(path))
        or (path.name == name and path.is_dir())
    ]
    if len(found) > 1:
        raise bad(folder, f"wanted one table {name}, got {', '.join(path.name for path in found)}")
    return found[0] if found else None


def parts_below(path: Path) -> list[Path]:
    """The data files of a folder in order, less what starts with "_" or "." (_SUCCESS)."""
    return sorted(
        part
        for part in path.rglob("*")
        if part.is_file()
        and format_of(part)
        and not any(word.startswith(("_", ".")) for word in part.relative_to(path).parts)
    )


def is_glob(path: str) -> bool:
    """Whether a path is a pattern: nothing has that name, and it has wildcards."""
    return glob.has_magic(path) and not Path(path).exists()


def table_at(path: Path, scratch: Path, pattern: str | None = None) -> Table:
    """The table of a file, of a folder of parts (also hive folders), or of a glob.

    Args:
        path: The file or folder; for a glob what messages call it.
        scratch: Where text is made Parquet.
        pattern: The glob.

    Raises:
        DataError: There is no file of a format that is read, or there are several formats.
    """
    root = path
    if pattern is not None:
        parts = [Path(each) for each in sorted(glob.glob(pattern, recursive=True))]
        parts = [part for part in parts if part.is_file()]
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        root = Path(fixed if fixed.endswith("/") else str(Path(fixed or ".").parent))
    elif path.is_dir():
        parts = parts_below(path)
    else:
        parts, root = [path], path.parent
    formats = {format_of(part) or part.suffix for part in parts}
    if not parts:
        raise bad(path, f"there is no {', '.join(sorted(set(_FORMATS)))} file")
    if len(formats) > 1 or not formats <= set(_FORMATS.values()):
        raise bad(
            path,
            "wanted files of one format (Parquet, CSV or JSON lines), got "
            f"{', '.join(sorted(formats))}",
        )
    keys = _hive_keys(root, parts)
    (format_,) = formats
    if format_ == "parquet":
        return parquet_table(path, parts, keys)
    made, text = _as_parquet(format_, parts, scratch)
    return parquet_table(path, made, keys, text=text, written=True, told=parts)


def _hive_keys(root: Path, parts: Sequence[Path]) -> dict[str, list[str | None]]:
    """Keys of folders such as dt=2024-05-31 below the root; those above it are only names."""
    found = []
    for part in parts:
        words = part.relative_to(root).parts[:-1]
        pairs = [word.split("=", 1) for word in words if "=" in word]
        found.append({unquote(key): unquote(value) for key, value in pairs})
    null = ("__HIVE_DEFAULT_PARTITION__", "")
    return {
        key: [None if one.get(key, "") in null else one[key] for one in found]
        for key in dict.fromkeys(key for one in found for key in one)
    }


def _as_parquet(format_: str, parts: Sequence[Path], scratch: Path) -> tuple[list[Path], bool]:
    """Copies text files to Parquet, one for one, in the order of their rows."""
    made = []
    with duckdb.connect() as database:
        json = _json_columns(database, parts) if format_ == "json" else ""
        for part in parts:
            if format_ == "json":
                source = f"read_json({sql(part)}, format='newline_delimited', columns={json})"
            else:
                source = (
                    f"read_csv({sql(part)}, header=true, all_varchar=true, hive_partitioning=false)"
                )
            target = scratch / f"text{len(list(scratch.iterdir()))}.parquet"
            copy(database, part, f"SELECT * FROM {source}", target)
            if format_ == "csv":
                _check_twins(part, pq.read_schema(target).names)
            made.append(target)
    return made, format_ == "csv"


def copy(database: Any, path: Path, query: str, target: Path) -> None:
    """Writes a query's rows to Parquet, in their order.

    Raises:
        DataError: The file that the query reads is damaged.
    """
    try:
        database.execute(f"COPY ({query}) TO {sql(target)} (FORMAT parquet, COMPRESSION zstd)")
    except duckdb.Error as error:
        first = next(line for line in str(error).splitlines() if line.strip())
        raise bad(path, f"it cannot be read: {first}") from error


def _json_columns(database: Any, parts: Sequence[Path]) -> str:
    """Names and types over all files; what looks like a time or a uuid stays the text it is."""
    files = "[" + ", ".join(sql(part) for part in parts) + "]"
    source = (
        f"read_json({files}, format='newline_delimited', sample_size=-1, hive_partitioning=false)"
    )
    try:
        columns = database.execute(f"DESCRIBE FROM {source}").fetchall()
    except duckdb.Error as error:
        first = next(line for line in str(error).splitlines() if line.strip())
        raise bad(parts[0], f"not JSON lines: {first}") from error
    kept = (
        "BIGINT",
        "DOUBLE",
        "BOOLEAN",
        "UBIGINT",
        "VARCHAR",
        "DOUBLE[]",
        "BIGINT[]",
        "VARCHAR[]",
    )
    pairs = [
        f"{sql(name)}: {sql(type_ if type_ in kept else 'VARCHAR')}" for name, type_, *_ in columns
    ]
    return "{" + ", ".join(pairs) + "}"


def _check_twins(path: Path, names: Sequence[str]) -> None:
    lower = [name.lower() for name in names]
    for name in names:
        base = re.sub(r"_\d+$", "", name.lower())
        if base != name.lower() and base in lower:
            raise bad(
                path, f"{name!r} stands beside {base!r}: two columns of one name but for case?"
            )


def sql(value: object) -> str:
    """A string in SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def frame_table(name: str, frame: Any, scratch: Path) -> Table:
    """A pandas or polars DataFrame or an Arrow table as a table.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(frame, pa.Table):
        table = frame
    elif isinstance(frame, pa.RecordBatch):
        table = pa.Table.from_batches([frame])
    elif type(frame).__module__.split(".")[0] == "pandas":
        table = pa.Table.from_pandas(frame, preserve_index=False)
    elif type(frame).__module__.split(".")[0] == "polars" and hasattr(frame, "to_arrow"):
        table = frame.to_arrow()
    else:
        raise TypeError(
            f"{name}: wanted a path, or a DataFrame of pandas or polars, or an Arrow table, got "
            f"{type(frame).__name__}"
        )
    target = scratch / f"{name}.parquet"
    pq.write_table(table, target)
    return parquet_table(Path(name), [target], told=[Path(f"{name} (a DataFrame)")])
