"""What a server showed, read back as a log."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from onerec.errors import DataError

_WANTED = ("user_id", "item_id", "timestamp", "request_id", "position", "version", "policy")


def read_exposures(folder: str | Path) -> pa.Table:
    """The items that a server showed, one row each, in the columns of docs/data.md.

    Beside `user_id`, `item_id`, `timestamp` (ms UTC) and `request_id` there are `session` (0 is the
    best), `position`, `score` (null for rankings), `history_length`, `version`, `export` and
    `policy` (the arm of an A/B split). Join what came of them by `request_id` and `item_id`, write
    the table as interactions.parquet, and `open_log` takes it.

    Args:
        folder: Of `onerec serve --served_log`; files that are still being written are passed over.

    Returns:
        By time; rows of requests without a user are left out.

    Raises:
        DataError: There are no files, or one is not such a log.
    """
    files = sorted(Path(folder).glob("served-*.jsonl"))
    if not files:
        raise DataError(f"{folder}: wanted served-*.jsonl of `onerec serve --served_log`, got none")
    # A request id of a client's own may look like a time.
    text = pj.ParseOptions(explicit_schema=pa.schema([("request_id", pa.string())]))
    tables = []
    for file in files:
        if not file.stat().st_size:
            continue
        try:
            table = pj.read_json(file, parse_options=text)
        except pa.ArrowException as error:
            raise DataError(f"{file}: wanted JSON lines: {error}") from None
        if missing := [name for name in _WANTED if name not in table.column_names]:
            raise DataError(f"{file}: wanted columns {', '.join(_WANTED)}; {missing[0]} is missing")
        tables.append(table)
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{folder}: files with ids of two kinds: {error}") from None
    whole = whole.filter(pc.is_valid(whole["user_id"]))
    return whole.sort_by([("timestamp", "ascending")])
