"""A session set carried forward by new rows: what a run's later days are read into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onerec.data.config import SessionConfig
from onerec.data.schema import bad
from onerec.data.session_set import COLUMNS, SessionSet, list_values
from onerec.data.sessions.exposures import read_exposures
from onerec.data.sessions.item_vectors import later_vectors
from onerec.data.sessions.targets import keep
from onerec.data.sessions.windows import session_query
from onerec.data.source import LogSource
from onerec.errors import DataError
from onerec.files import atomic_directory, check_replaceable

LEARN = "learn.npy"
_NEVER = 1 << 62  # a cut in time that no row reaches

Ints = npt.NDArray[np.int64]


def add_day(
    log: LogSource,
    before: Path,
    config: SessionConfig,
    out_dir: str | Path,
    *,
    held_out: float = 0.1,
) -> SessionSet:
    """Adds a log's new rows to a session set, and writes the whole to another folder.

    Users, items and their vectors keep their rows; new ones come behind them. Rows that are not
    later than the latest one of the set are known already and are left out. What was held out
    before is now of train; of the users with new sessions a share is held out ("valid"). The new
    rows of train, and what was held out before, are what a network has yet to learn: their places
    in `samples("train")` are in learn.npy.

    Args:
        log: An open log. Its items may be the new ones only; an item that nobody has told of is
            known by its rows.
        before: Folder of the session set, which `build_sessions` or this function wrote.
        config: That the set was built with.
        out_dir: The folder to write; an earlier one of this function is replaced.
        held_out: Share of the users with new sessions, in [0, 1).

    Raises:
        DataError: The log has no times or not the columns of the set's rule, item ids of another
            type, or vectors of another space.
        FileExistsError: `out_dir` holds other files.
    """
    check_replaceable(out_dir, LEARN)
    if log.time == "position":
        raise DataError(f"{log.path}: wanted times, by which new rows are known, got positions")
    old = SessionSet.load(before)
    rule, length = old.funnel["rule"], old.session_length
    column = f"{rule}_id"
    if rule in ("request", "session") and column not in log.interactions.columns:
        raise log.table.bad(f"the column is missing; the run's rule is {rule!r}", column)
    if not (before / "basis.npz").is_file():
        raise bad(before / "basis.npz", "there is no such file; make the sessions stage again")
    with np.load(before / "basis.npz", allow_pickle=False) as file:
        basis = {name: file[name] for name in file.files}

    times = list_values(old.sequences["timestamps"])[0]
    latest = int(times.max(initial=-1))
    items = _items(log, old)
    rows = log.interactions
    fresh = replace(log, items=items, interactions=rows.filter(rows.timestamp > latest))
    exposures = read_exposures(fresh, config)
    total = int(rows.count().to_pyarrow().as_py())
    query = session_query(
        fresh, replace(config, min_history=0, length=length), rule, "time", (_NEVER, _NEVER + 1)
    )
    candidates = log.connection.keep("onerec_candidates", query.candidates(exposures.table))
    kept, _, _ = keep(candidates, replace(config, min_history=0), rule)
    day = kept.select(list(COLUMNS["sessions"])).to_pyarrow()
    new = query.sequences(exposures.users, exposures.positives).to_pyarrow()
    for table in ("items", "users", "exposures", "candidates"):
        log.connection.drop(f"onerec_{table}")

    sequences, user_of, had = _joined(old.sequences, new)
    local = day["user_row"].to_numpy()
    start = day["start"].to_numpy().astype(np.int64) + had[local]
    day = day.set_column(0, "user_row", pa.array(user_of[local].astype(np.int32)))
    day = day.set_column(1, "start", pa.array(start.astype(np.int32)))
    day = day.filter(pa.array(start >= config.min_history))
    users = np.unique(day["user_row"].to_numpy())
    rng = np.random.default_rng([config.seed, old.sessions.num_rows])
    held = np.sort(rng.permutation(users)[: round(held_out * len(users))])
    inside = np.isin(day["user_row"].to_numpy(), held)
    split = np.where(inside, "valid", "train")
    day = day.set_column(2, "split", pa.array(split, pa.string()))

    was = old.sessions
    unlearned = pc.not_equal(was["split"], "train").to_numpy()
    everything = pa.concat_tables(
        [
            was.set_column(2, "split", pa.array(np.full(was.num_rows, "train"), pa.string())),
            day.cast(was.schema),
        ]
    )
    in_train = np.concatenate([np.ones(was.num_rows, bool), ~inside])
    to_learn = np.concatenate([unlearned, np.ones(day.num_rows, bool)])
    learn = np.flatnonzero(to_learn[in_train])

    values, offsets = list_values(sequences["items"])
    sizes = np.diff(offsets)
    # The new rows of a user who is held out are in no count and in no vector.
    added = np.zeros(len(sizes), np.int64)
    added[user_of] = sizes[user_of] - had
    shown = added.copy()
    shown[held] = 0
    seen = _before(values, offsets, sizes - added + shown, sizes)
    counts = np.bincount(values[seen], minlength=items.num_rows)
    around = np.minimum(sizes, shown + config.cooccurrence_window)
    around[shown == 0] = 0
    near = ~_before(values, offsets, sizes - around, sizes)
    near_offsets = np.concatenate([[0], np.cumsum(around)])
    source = old.funnel["embeddings"]["source"]
    vectors, filled = old.embeddings[:0], 0
    if items.num_rows > old.n_items:
        vectors, filled = later_vectors(
            log, config, source, old.embeddings, items, basis, (values[near], near_offsets)
        )
    funnel = {
        **old.funnel,
        "log": {"kind": log.kind, "path": str(log.path), "time": log.time, **log.found},
        "users": sequences.num_rows,
        "items": items.num_rows,
        "split": {
            "rule": "last",
            "reason": f"{len(held)} users of the new rows are held out",
            "time": log.time,
        },
        "sessions": {
            "train": everything.num_rows - int(inside.sum()),
            "valid": int(inside.sum()),
            "test": 0,
        },
        "embeddings": {**old.funnel["embeddings"], "filled_new": filled},
        "day": {
            "rows": exposures.in_log,
            "known_rows": total - exposures.in_log,
            "positive_rows": int(added.sum()),
            "sessions": day.num_rows,
            "users": len(users),
            "new_users": sequences.num_rows - old.sequences.num_rows,
            "held_out_users": len(held),
            "new_items": items.num_rows - old.n_items,
            "filled_vectors": filled,
            "from": latest,
        },
    }
    with atomic_directory(out_dir) as folder:
        pq.write_table(sequences, folder / "sequences.parquet", compression="zstd")
        pq.write_table(everything, folder / "sessions.parquet", compression="zstd")
        items = items.append_column("train_count", pa.array(counts))
        pq.write_table(items, folder / "items.parquet", compression="zstd")
        np.save(folder / "embeddings.npy", np.concatenate([old.embeddings, vectors]))
        np.savez(folder / "basis.npz", **basis)
        np.save(folder / LEARN, learn)
        text = json.dumps(funnel, indent=2, ensure_ascii=False)
        (folder / "funnel.json").write_text(text, encoding="utf-8")
    return SessionSet.load(out_dir)


def _items(log: LogSource, old: SessionSet) -> pa.Table:
    """The items so far, and behind them those that the log has besides."""
    columns = [name for name in COLUMNS["items"] if name != "train_count"]
    known, here = old.items.select(columns), log.items.select(columns)
    kinds = {
        "item_id": (known["item_id"].type, pa.types.is_integer(here["item_id"].type)),
        "user_id": (old.sequences["user_id"].type, log.interactions.user_id.type().is_integer()),
    }
    for name, (wanted, whole) in kinds.items():
        if pa.types.is_integer(wanted) != whole:
            got = "integers" if whole else "strings"
            raise log.table.bad(f"wanted the type of the run's ({wanted}), got {got}", name)
    new = here.filter(
        pc.invert(pc.is_in(here["item_id"], value_set=known["item_id"].combine_chunks()))
    )
    index = np.arange(known.num_rows, known.num_rows + new.num_rows, dtype=np.int32)
    new = new.set_column(0, "item_index", pa.array(index))
    return pa.concat_tables([known, new.cast(known.schema)])


def _joined(old: pa.Table, new: pa.Table) -> tuple[pa.Table, Ints, Ints]:
    """Sequences with new rows behind the old ones.

    Returns:
        All users, those of `old` first; for each row of `new` its row there, and how many items
        the user had before.
    """
    known = {user: row for row, user in enumerate(old["user_id"].to_pylist())}
    ids = new["user_id"].to_pylist()
    rows = np.array([known.setdefault(user, len(known)) for user in ids], dtype=np.int64)
    total = len(known)
    columns: dict[str, Any] = {
        "user_row": pa.array(np.arange(total, dtype=np.int32)),
        "user_id": pa.array(list(known), type=old.schema.field("user_id").type),
    }
    had = np.zeros(len(ids), np.int64)
    for name in ("items", "timestamps"):
        (values, offsets), (more, at) = list_values(old[name]), list_values(new[name])
        sizes = np.zeros(total, np.int64)
        sizes[: old.num_rows] = np.diff(offsets)
        had = sizes[rows]
        grown = sizes.copy()
        grown[rows] += np.diff(at)
        begins = np.concatenate([[0], np.cumsum(grown)])
        out = np.empty(begins[-1], values.dtype)
        out[_places(begins[: old.num_rows], np.diff(offsets))] = values
        out[_places(begins[rows] + had, np.diff(at))] = more
        kind = old.schema.field(name).type.value_type
        columns[name] = pa.ListArray.from_arrays(
            pa.array(begins.astype(np.int32)), pa.array(out, type=kind)
        )
    return pa.table(columns), rows, had


def _places(begin: Ints, sizes: Ints) -> Ints:
    """begin[i], begin[i] + 1, .. for `sizes[i]` places of each i, behind each other."""
    first = np.repeat(begin - (np.cumsum(sizes) - sizes), sizes)
    return first + np.arange(int(sizes.sum()))


def _before(
    values: npt.NDArray[np.int32], offsets: Ints, cut: Ints, sizes: Ints
) -> npt.NDArray[np.bool_]:
    """Whether a place of a sequence is before the sequence's `cut`, bool [values]."""
    at = np.arange(len(values)) - np.repeat(offsets[:-1], sizes)
    return at < np.repeat(cut, sizes)
