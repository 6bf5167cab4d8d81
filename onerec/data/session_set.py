"""The sessions stage as files: what training and evaluation read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec.data.schema import bad
from onerec.ragged import padded

SPLITS = ("train", "valid", "test")

COLUMNS = {
    "items": {
        "item_index": pa.int32(),
        "item_id": None,
        "text": pa.string(),
        "tags": pa.list_(pa.string()),
        "duration_ms": pa.int64(),
        "train_count": pa.int64(),
    },
    "sequences": {
        "user_row": pa.int32(),
        "user_id": None,
        "items": pa.list_(pa.int32()),
        "timestamps": pa.list_(pa.int64()),
    },
    "sessions": {
        "user_row": pa.int32(),
        "start": pa.int32(),
        "split": pa.string(),
        "timestamp": pa.int64(),
        "target": pa.list_(pa.int32()),
        "watch_time_ms": pa.int64(),
        "watched": pa.int32(),
        "interactions": pa.int32(),
    },
}
EXPOSED = {
    "user_row": pa.int32(),
    "start": pa.int32(),
    "split": pa.string(),
    "timestamp": pa.int64(),
    "items": pa.list_(pa.int32()),
}


@dataclass(frozen=True)
class Samples:
    """The sessions of one split: histories and targets, with nothing copied per sample.

    Args:
        sequence_values: int32 [total], every user's positive items one after another (shared by
            all splits).
        history_begin: int64 [n], where a sample's history begins in `sequence_values`.
        history_end: int64 [n], where it ends (exclusive).
        target_values: int32 [targets], the target items one after another.
        target_offsets: int64 [n + 1], sample i's target is `target_values[o[i]:o[i + 1]]`.
        user_row: int32 [n], the user's row of `sequences`.
        timestamp: int64 [n], when the session began: ms UTC, or a position in a log without times.
    """

    sequence_values: npt.NDArray[np.int32]
    history_begin: npt.NDArray[np.int64]
    history_end: npt.NDArray[np.int64]
    target_values: npt.NDArray[np.int32]
    target_offsets: npt.NDArray[np.int64]
    user_row: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_row)

    def history(self, index: int) -> npt.NDArray[np.int32]:
        """Item indices before session `index`, oldest first, int32 [h] (a view)."""
        return self.sequence_values[self.history_begin[index] : self.history_end[index]]

    def target(self, index: int) -> npt.NDArray[np.int32]:
        """Item indices of session `index`, int32 [at most m] (a view)."""
        return self.target_values[self.target_offsets[index] : self.target_offsets[index + 1]]

    def histories(self, indices: npt.ArrayLike, length: int) -> npt.NDArray[np.int32]:
        """The last `length` history items of each sample, oldest first, padded right with -1.

        Returns:
            int32 [len(indices), length].
        """
        indices = np.asarray(indices, dtype=np.int64)
        end = self.history_end[indices]
        begin = np.maximum(self.history_begin[indices], end - length)
        return padded(self.sequence_values, begin, end - begin, length)

    def targets(self, indices: npt.ArrayLike, length: int) -> npt.NDArray[np.int32]:
        """The first `length` target items of each sample, padded right with -1.

        Returns:
            int32 [len(indices), length].
        """
        indices = np.asarray(indices, dtype=np.int64)
        begin = self.target_offsets[indices]
        end = np.minimum(self.target_offsets[indices + 1], begin + length)
        return padded(self.target_values, begin, end - begin, length)

    def sample(self, most: int, seed: int = 0) -> Samples:
        """At most `most` of the samples, drawn with a seed, in their order."""
        if len(self) <= most:
            return self
        drawn = np.random.default_rng(seed).choice(len(self), size=most, replace=False)
        return self.take(np.sort(drawn))

    def take(self, indices: npt.ArrayLike) -> Samples:
        """The samples at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        sizes = (self.target_offsets[1:] - self.target_offsets[:-1])[indices]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        source = np.repeat(self.target_offsets[indices] - offsets[:-1], sizes) + np.arange(
            offsets[-1]
        )
        return Samples(
            self.sequence_values,
            self.history_begin[indices],
            self.history_end[indices],
            self.target_values[source],
            offsets,
            self.user_row[indices],
            self.timestamp[indices],
        )


def list_values(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list column as (values, offsets [rows + 1]) without Python objects."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], type=column.type)
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]


@dataclass(frozen=True)
class ExposedSessions:
    """What was shown in one split, with feedback: what a reward model learns from.

    Args:
        sequence_values: As in `Samples`.
        history_begin: As in `Samples`.
        history_end: As in `Samples`.
        items: int32 [n, m], item indices in the order shown, -1 past a session's end.
        feedback: Column of the log -> float32 [n, m], NaN where unknown and past a session's end:
            "watch_time_ms", "duration_ms" (of the log, else of the items table) and the flags.
        user_row: int32 [n].
        timestamp: int64 [n].
    """

    sequence_values: npt.NDArray[np.int32]
    history_begin: npt.NDArray[np.int64]
    history_end: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    feedback: dict[str, npt.NDArray[np.float32]]
    user_row: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_row)

    def histories(self, indices: npt.ArrayLike, length: int) -> npt.NDArray[np.int32]:
        """The last `length` history items of each session, padded with -1: int32 [n, length]."""
        indices = np.asarray(indices, dtype=np.int64)
        end = self.history_end[indices]
        begin = np.maximum(self.history_begin[indices], end - length)
        return padded(self.sequence_values, begin, end - begin, length)

    def take(self, indices: npt.ArrayLike) -> ExposedSessions:
        """The sessions at `indices`, in that order."""
        at = np.asarray(indices, dtype=np.int64)
        return ExposedSessions(
            self.sequence_values,
            self.history_begin[at],
            self.history_end[at],
            self.items[at],
            {name: values[at] for name, values in self.feedback.items()},
            self.user_row[at],
            self.timestamp[at],
        )


@dataclass(frozen=True)
class SessionSet:
    """The output of the sessions stage.

    Args:
        items: item_index, item_id, text, tags, duration_ms, train_count; row = item index.
        sequences: user_row, user_id, items (positive exposures in time order), timestamps.
        sessions: user_row, start (the history is `items[:start]`), split, timestamp, target,
            watch_time_ms, watched, interactions.
        embeddings: float32 [N, d], one row an item.
        funnel: What was counted, dropped and chosen on the way (funnel.json).
        exposed: What was shown, with feedback: user_row, start, split, timestamp, items (a list),
            and lists float32 (null where unknown) of the log's feedback columns; None for a log
            without feedback.
    """

    items: pa.Table
    sequences: pa.Table
    sessions: pa.Table
    embeddings: npt.NDArray[np.float32]
    funnel: dict[str, Any]
    exposed: pa.Table | None = None

    @classmethod
    def load(cls, folder: str | Path) -> SessionSet:
        """Reads the files that `build_sessions` wrote.

        Raises:
            DataError: A file is missing, cut short, or does not agree with the others.
        """
        folder = Path(folder)
        tables = {
            name: _read(folder / f"{name}.parquet", columns) for name, columns in COLUMNS.items()
        }
        funnel_path, vectors_path = folder / "funnel.json", folder / "embeddings.npy"
        for path in (funnel_path, vectors_path):
            if not path.is_file():
                raise bad(path, "there is no such file; run the sessions stage again")
        try:
            funnel = json.loads(funnel_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise bad(funnel_path, f"not whole JSON: {error}") from error
        try:
            vectors = np.load(vectors_path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise bad(vectors_path, f"not a whole .npy file: {error}") from error
        n_items, n_users = tables["items"].num_rows, tables["sequences"].num_rows
        if vectors.ndim != 2 or len(vectors) != n_items or vectors.dtype != np.float32:
            raise bad(
                vectors_path,
                f"wanted float32 [{n_items}, d] (one row an item of items.parquet), "
                f"got {vectors.dtype} {list(vectors.shape)}",
            )
        if (folder / "exposed.parquet").is_file():
            tables["exposed"] = _read_exposed(folder / "exposed.parquet")
        loaded = cls(**tables, embeddings=vectors, funnel=funnel)
        for name, column, size in (
            ("sequences", "items", n_items),
            ("sessions", "target", n_items),
            ("sessions", "user_row", n_users),
            ("exposed", "items", n_items),
            ("exposed", "user_row", n_users),
        ):
            if name not in tables:
                continue
            table = tables[name]
            values = (
                table[column].to_numpy() if column == "user_row" else list_values(table[column])[0]
            )
            if len(values) and (values.min() < 0 or values.max() >= size):
                raise bad(
                    folder / f"{name}.parquet",
                    f"wanted 0..{size - 1}, got {values.min()}..{values.max()}",
                    column=column,
                )
        lengths = pc.list_value_length(loaded.sequences["items"]).to_numpy()
        for name in ("sessions", "exposed"):
            if name not in tables:
                continue
            start = tables[name]["start"].to_numpy()
            limit = lengths[tables[name]["user_row"].to_numpy()]
            wrong = (start < 0) | (start > limit)
            if wrong.any():
                row = int(wrong.argmax())
                raise bad(
                    folder / f"{name}.parquet",
                    f"wanted 0..{limit[row]} (the user's sequence), got {start[row]}",
                    column="start",
                    row=row,
                )
        return loaded

    @property
    def n_items(self) -> int:
        """How many items the catalogue has."""
        return int(self.items.num_rows)

    @property
    def session_length(self) -> int:
        """m, the most items of a session, that the sessions were built with."""
        return int(self.funnel["length"])

    @property
    def exclude_history(self) -> bool:
        """Whether what a user has taken is left out of recommendations unless somebody says so.

        The share of repeats among the targets decided it (`repeats` in funnel.json).
        """
        return bool(self.funnel["repeats"]["exclude_history"])

    def describe(self) -> list[str]:
        """What was chosen and what it kept, in a few lines for the terminal."""
        funnel, targets, repeats = self.funnel, self.funnel["targets"], self.funnel["repeats"]
        m, split = self.session_length, funnel["split"]
        rows, train = targets["positive rows"], targets["that are a training target"]
        kept = (
            f"{targets['that are a target']:,} of {rows:,} positive rows are a target, {train:,} "
            "of training"
        )
        if train < rows / 2:
            kept = f"1 of {rows / train:.3g} positive rows is a training target: {kept}"
            if funnel["rule"] != "next":
                kept += "; --sessions.rule next makes targets of all but each user's first"
        again = (
            "recommendations leave out what the user has taken (exclude_history)"
            if self.exclude_history
            else "recommendations may repeat (exclude_history true leaves repeats out)"
        )
        return [
            f"rule {funnel['rule']}, at most {m} item{'s' * (m > 1)}: {funnel['rule_reason']}",
            f"split {split['rule']}: {split['reason']}",
            kept,
            f"{repeats['share']:.1%} of the training targets are in the history: {again}",
        ]

    def samples(self, split: str) -> Samples:
        """The sessions of one split.

        Args:
            split: "train", "valid" or "test".

        Raises:
            ValueError: Another split.
        """
        if split not in SPLITS:
            raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
        rows = self.sessions.filter(pc.equal(self.sessions["split"], split))
        values, offsets = list_values(self.sequences["items"])
        target_values, target_offsets = list_values(rows["target"])
        user_row = rows["user_row"].to_numpy()
        begin = offsets[user_row]
        return Samples(
            sequence_values=values,
            history_begin=begin,
            history_end=begin + rows["start"].to_numpy(),
            target_values=target_values,
            target_offsets=target_offsets,
            user_row=user_row,
            timestamp=rows["timestamp"].to_numpy(),
        )

    def exposed_sessions(self, split: str) -> ExposedSessions:
        """What was shown in one split, with its feedback.

        Args:
            split: "train", "valid" or "test".

        Raises:
            ValueError: Another split, or a log without feedback.
        """
        if split not in SPLITS:
            raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
        if self.exposed is None:
            why = self.funnel.get("exposed", {}).get("why", "exposed.parquet is missing")
            raise ValueError(f"exposed sessions: {why}")
        rows = self.exposed.filter(pc.equal(self.exposed["split"], split))
        values, offsets = list_values(self.sequences["items"])
        shown, at = list_values(rows["items"])
        width = int(np.diff(at).max(initial=1))
        items = padded(shown, at[:-1], np.diff(at), width)
        inside = items >= 0
        feedback = {}
        for name in rows.column_names:
            if name in EXPOSED:
                continue
            column = np.full(items.shape, np.nan, dtype=np.float32)
            column[inside] = list_values(rows[name])[0]
            feedback[name] = column
        known = self.items["duration_ms"].to_numpy().astype(np.float32)
        of_items = np.where(inside, known[np.maximum(items, 0)], np.float32(np.nan))
        duration = feedback.get("duration_ms", of_items)
        feedback["duration_ms"] = np.where(duration > 0, duration, of_items)
        user_row = rows["user_row"].to_numpy()
        begin = offsets[user_row]
        return ExposedSessions(
            sequence_values=values,
            history_begin=begin,
            history_end=begin + rows["start"].to_numpy(),
            items=items,
            feedback=feedback,
            user_row=user_row,
            timestamp=rows["timestamp"].to_numpy(),
        )


def _read_exposed(path: Path) -> pa.Table:
    """exposed.parquet: its fixed columns, and its feedback as lists of equal lengths."""
    table = _read(path, EXPOSED)
    whole = pq.read_table(path)
    offsets = list_values(table["items"])[1]
    for name in whole.column_names:
        if name in table.column_names:
            continue
        column = whole[name].cast(pa.list_(pa.float32()))
        if not np.array_equal(list_values(column)[1], offsets):
            raise bad(path, "wanted a value for each item of `items`", column=name)
        table = table.append_column(name, column)
    return table


def _read(path: Path, wanted: dict[str, Any]) -> pa.Table:
    if not path.is_file():
        raise bad(path, "there is no such file; run the sessions stage again")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise bad(path, f"not a whole Parquet file: {error}") from error
    columns = []
    for column, type_ in wanted.items():
        if column not in table.column_names:
            raise bad(path, "the column is missing", column=column)
        values = table[column]
        if type_ is not None and values.type != type_:
            try:
                values = values.cast(type_)
            except pa.ArrowException as error:
                raise bad(path, f"wanted {type_}, got {values.type}", column=column) from error
        columns.append(values)
    return cast(pa.Table, pa.table(columns, names=list(wanted)))
