"""Recommendations for the users or histories of a file, by a finished run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.recommend import recommendation_rows
from onerec.pipeline.settings import Settings
from onerec.progress import Listener

ENDINGS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Requests:
    """Who is recommended to.

    Attributes:
        name: "user_id", or "request" for histories without users, numbered from 0.
        keys: Of each request.
        histories: Item ids of each, oldest first; None: the history that the log has.
    """

    name: str
    keys: list[Any]
    histories: list[list[Any] | None]


def recommend_users(
    settings: Settings, inputs: Inputs, users: Path, out: Path | TextIO, listener: Listener
) -> dict[str, int]:
    """Writes the best items of each user or history of a file, a row an item.

    Args:
        settings: Its section `recommend` says how many.
        inputs: The run.
        users: Parquet, CSV or JSON lines with the column `user_id` (users of the log), `history`
            (item ids, oldest first; in CSV parted by spaces, or as JSON), or both: a history then
            stands for the log's, and its user may be a new one.
        out: A file that ends in .parquet, .jsonl or .json, or a stream for JSON lines. Rows are
            those of recommendations.parquet; histories without users have `request`, their place
            in the file, in place of `user_id`.
        listener: Told of the work.

    Returns:
        "requests", "rows", and "without_items": requests that got none.

    Raises:
        DataError: The file cannot be read, or it names a user that the log does not have.
        ValueError: `out` has another ending.
    """
    if isinstance(out, Path) and out.suffix not in ENDINGS:
        raise ValueError(f"to: wanted a file that ends in {', '.join(ENDINGS)}, got {out}")
    data, catalog = inputs.load()
    user_type = data.sequences.schema.field("user_id").type
    item_type = data.items.schema.field("item_id").type
    requests = read_requests(users, user_type, item_type)
    place = {user: row for row, user in enumerate(data.sequences["user_id"].to_pylist())}
    for row, (key, history) in enumerate(zip(requests.keys, requests.histories, strict=True)):
        if history is None and key not in place:
            raise DataError(
                f"{users}, column 'user_id', row {row}: {key!r} is not in the log; a new user "
                "needs a history"
            )
    served = inputs.served_model(settings).stage
    recommender = inputs.recommender(served, catalog, inputs.mixture(settings, whole=True))
    config = settings.recommend
    exclude = data.exclude_history if config.exclude_history is None else config.exclude_history
    texts = dict(
        zip(data.items["item_id"].to_pylist(), data.items["text"].to_pylist(), strict=True)
    )
    schema = pa.schema(
        [
            (requests.name, user_type if requests.name == "user_id" else pa.int64()),
            ("rank", pa.int32()),
            ("session", pa.int32()),
            ("position", pa.int32()),
            ("item_id", item_type),
            ("score", pa.float32()),
            ("text", pa.string()),
        ]
    )
    sequences = data.sequences["items"]
    count = len(requests.keys)
    written = without = 0
    with ExitStack() as stack:
        report = stack.enter_context(listener.progress("recommend"))
        write = stack.enter_context(_writer(out, schema))
        for begin in range(0, count, config.batch_size):
            keys = requests.keys[begin : begin + config.batch_size]
            histories = [
                catalog.item_ids[np.asarray(sequences[place[key]].as_py(), int)].tolist()
                if history is None
                else history
                for key, history in zip(keys, requests.histories[begin:], strict=False)
            ]
            found = recommendation_rows(recommender, histories, config, exclude)
            rows = [
                {requests.name: key, "rank": rank, **row, "text": texts[row["item_id"]] or ""}
                for key, mine in zip(keys, found, strict=True)
                for rank, row in enumerate(mine)
            ]
            write(rows)
            written += len(rows)
            without += sum(not mine for mine in found)
            report(begin + len(keys), count, "")
    return {"requests": count, "rows": written, "without_items": without}


class _writer(ExitStack):
    """`with _writer(out, schema) as write: write(rows)`, to a file as a whole or to a stream."""

    def __init__(self, out: Path | TextIO, schema: pa.Schema) -> None:
        super().__init__()
        self.out, self.schema = out, schema

    def __enter__(self) -> Any:
        super().__enter__()
        if not isinstance(self.out, Path):
            return lambda rows: _write_lines(self.out, rows)
        temporary = self.enter_context(atomic_write(self.out))
        if self.out.suffix == ".parquet":
            writer = self.enter_context(pq.ParquetWriter(temporary, self.schema))
            return lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema=self.schema))
        file = self.enter_context(temporary.open("w", encoding="utf-8"))
        return lambda rows: _write_lines(file, rows)


def _write_lines(file: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_requests(path: Path, user_type: pa.DataType, item_type: pa.DataType) -> Requests:
    """Reads users and histories; ids become those of the log.

    Raises:
        DataError: There is no such file, it is damaged, has neither column or no rows, or a value
            is no id of the log's type.
    """
    rows = list(_rows(path))
    names = {name for row in rows for name in row}
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    if not {"user_id", "history"} & names:
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(f"{path}: wanted a column 'user_id' or 'history', the file has {found}")
    with_users = "user_id" in names
    keys: list[Any] = []
    histories: list[list[Any] | None] = []
    for number, row in enumerate(rows):
        key: Any = number
        if with_users:
            key = _id(row.get("user_id"), user_type, f"{path}, column 'user_id', row {number}")
        history = row.get("history")
        where = f"{path}, column 'history', row {number}"
        if isinstance(history, str):
            history = _split(history, where)
        if history is not None and not isinstance(history, list):
            raise DataError(f"{where}: wanted a list of item ids, got {history!r}")
        if history is None and not with_users:
            raise DataError(f"{where}: wanted a list of item ids, got null")
        keys.append(key)
        histories.append(None if history is None else [_id(i, item_type, where) for i in history])
    return Requests("user_id" if with_users else "request", keys, histories)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
        elif path.suffix in (".csv", ".tsv"):
            yield from _csv(path).to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}, row {number}: wanted an object, got {line[:80]}")
                    yield row
        else:
            raise DataError(f"{path}: wanted .parquet, .csv, .tsv, .jsonl or .json")
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: it cannot be read ({' '.join(str(error).split())})") from None


def _csv(path: Path) -> pa.Table:
    """The table with every value as it is written: `007` stays `007`, nothing is null."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with path.open("rb") as file:
        reader = pyarrow.csv.open_csv(file, parse_options=parse)
        names = reader.schema.names
    convert = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        strings_can_be_null=True,
        null_values=[""],
    )
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _split(text: str, where: str) -> list[Any]:
    """Item ids written as text: a JSON list, or parted by spaces."""
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        return list(json.loads(text))
    except ValueError:
        raise DataError(f"{where}: wanted a JSON list of item ids, got {text[:80]!r}") from None


def _id(value: Any, wanted: pa.DataType, where: str) -> Any:
    """An id of the log's type; digits are an integer where the log has integers."""
    if pa.types.is_integer(wanted):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            return int(value)
        raise DataError(f"{where}: wanted an integer as in the log, got {value!r}")
    if not isinstance(value, str):
        raise DataError(f"{where}: wanted a string as in the log, got {value!r}")
    return value
