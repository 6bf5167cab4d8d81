"""High-quality sessions from a log: one relational query, run by DuckDB through Ibis.

What a session is follows section 2.1 of arXiv 2502.18965: the videos of one request, kept when
the user really watched enough of them, watched long enough in all, or interacted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.config import SessionConfig
from onerec.data.schema import FLAGS
from onerec.data.session_set import COLUMNS, EXPOSED, SPLITS, SessionSet
from onerec.data.sessions.exposures import read_exposures
from onerec.data.sessions.item_vectors import item_vectors
from onerec.data.sessions.query import SessionQuery, split_name
from onerec.data.sessions.terms import check_order, settle_cuts, settle_rule, settle_split
from onerec.data.source import LogSource
from onerec.errors import DataError, OneRecError
from onerec.files import atomic_directory, check_replaceable


def build_sessions(
    log: LogSource,
    config: SessionConfig,
    out_dir: str | Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> SessionSet:
    """Builds sessions, sequences, item counts and item vectors, and writes them to `out_dir`.

    The folder appears whole or not at all: items.parquet, sequences.parquet, sessions.parquet,
    exposed.parquet where the log has feedback, embeddings.npy, funnel.json (docs/data.md).

    A history holds only exposures before the session. Train counts and co-occurrence come from
    positive exposures before the valid cut alone, and a session that reaches over a cut is
    dropped. Equal timestamps keep the order of the log's rows.

    Args:
        log: An open log.
        config: What a session is.
        out_dir: The folder to write; an earlier one of this function is replaced.
        progress: Called as progress(steps done, steps, what comes now).

    Raises:
        DataError: Items of the log are unknown, or a split is left without sessions.
        FileExistsError: `out_dir` holds other files.
        OneRecError: Memory or disk ran out.
        ValueError: The config asks for what the log does not have.
    """
    check_replaceable(out_dir, "funnel.json")
    try:
        _build(log, config, Path(out_dir), progress)
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise OneRecError(
            f"{log.path}: the database ran out of memory or disk while building sessions "
            f"(open_log's memory_limit; free space in the temporary folder and at {out_dir}): "
            f"{error}"
        ) from error
    return SessionSet.load(out_dir)


def _build(
    log: LogSource,
    config: SessionConfig,
    out_dir: Path,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    def tell(done: int, what: str) -> None:
        if progress is not None:
            progress(done, 5, what)

    tell(0, "reading exposures")
    engine = log.connection
    rule, reason = settle_rule(log, config)
    split = settle_split(log, config)
    exposures = read_exposures(log, config)
    if split == "column":
        check_order(log, exposures.table)
    positives = exposures.table.filter(exposures.table.positive)
    steps = [
        _step("rows in the log", "exposures", exposures.in_log),
        _step("rows with a known item", "exposures", exposures.known),
        _step("positive exposures", "exposures", positives.count().to_pyarrow().as_py()),
    ]
    cuts = settle_cuts(log, config, positives) if split == "time" else None
    query = SessionQuery(config, rule, split, cuts, log.interactions.columns, engine.collect)

    tell(1, "forming sessions")
    candidates = engine.keep("onerec_candidates", query.candidates(exposures.table))
    kept, session_steps, counts = _keep(candidates, config, rule)
    steps += session_steps
    for name in SPLITS:
        if not counts[name]:
            told = "; ".join(f"{step['count']:,} {step['step']}" for step in steps)
            raise DataError(f"{log.path}: no {name} session is left ({told})")
    funnel: dict[str, Any] = {
        "log": {"kind": log.kind, "path": str(log.path), "time": log.time, **log.found},
        "rule": rule,
        "rule_reason": reason,
        "config": asdict(config),
        "users": int(exposures.users.count().to_pyarrow().as_py()),
        "items": log.items.num_rows,
        "split": {"rule": split, "time": log.time},
        "criteria": "every exposure of a window is really watched or interacted with"
        if rule == "next"
        else {"require": config.require, "tested": list(query.criteria())},
        "steps": steps,
        "sessions": counts,
    }
    if cuts is not None:
        funnel["split"] |= {"valid_from": cuts[0], "test_from": cuts[1]}

    tell(2, "writing sequences")
    with atomic_directory(out_dir) as folder:
        sequences = query.sequences(exposures.users, positives)
        engine.write_parquet(sequences, folder / "sequences.parquet")
        tell(3, "writing sessions")
        engine.write_parquet(kept, folder / "sessions.parquet")
        train = engine.keep("onerec_train", query.train_positives(positives, candidates))
        _write_items(log, train, folder)
        funnel["exposed"] = _write_exposed(log, query, exposures.table, candidates, folder)
        tell(4, "item vectors")
        vectors, funnel["embeddings"] = item_vectors(log, config, train)
        np.save(folder / "embeddings.npy", vectors)
        (folder / "funnel.json").write_text(json.dumps(funnel, indent=2, ensure_ascii=False))
        for table in ("items", "users", "exposures", "candidates", "train"):
            engine.drop(f"onerec_{table}")
    tell(5, "done")


def _step(name: str, unit: str, count: int) -> dict[str, Any]:
    return {"step": name, "unit": unit, "count": count}


def _keep(
    candidates: Any, config: SessionConfig, rule: str
) -> tuple[Any, list[dict[str, Any]], dict[str, int]]:
    """The sessions that stay, in the columns of sessions.parquet, and what was dropped why."""
    c = candidates
    inside = ~c.straddles
    good = inside & c.good
    filled = good & (c.target.length() > 0)
    kept = filled & (c.start >= config.min_history)
    counted = (
        c.aggregate(
            all=c.count(),
            inside=inside.cast("int64").sum(),
            good=good.cast("int64").sum(),
            filled=filled.cast("int64").sum(),
            kept=kept.cast("int64").sum(),
            **{
                name: (kept & (c.period == period)).cast("int64").sum()
                for period, name in enumerate(SPLITS)
            },
        )
        .to_pyarrow()
        .to_pylist()[0]
    )
    counted = {name: int(value or 0) for name, value in counted.items()}
    what = {
        "request": "requests",
        "session": "sessions by id",
        "gap": "runs without a long pause",
        "next": "windows of the next good exposures",
    }[rule]
    steps = [_step(what, "sessions", counted["all"])]
    if rule != "next":
        steps += [
            _step("sessions inside one split", "sessions", counted["inside"]),
            _step("high-quality sessions", "sessions", counted["good"]),
            _step("sessions with a positive item", "sessions", counted["filled"]),
        ]
    history = f"sessions with a history of {config.min_history} or more"
    steps.append(_step(history, "sessions", counted["kept"]))
    rows = c.filter(kept).order_by(["period", "user_row", "timestamp", "start", "key"])
    rows = rows.mutate(split=split_name(rows.period)).select(list(COLUMNS["sessions"]))
    return rows, steps, {name: counted[name] for name in SPLITS}


def _write_items(log: LogSource, train: Any, folder: Path) -> None:
    """Writes items.parquet: the log's items with their counts in train."""
    found = train.group_by("item_index").aggregate(n=train.count()).to_pyarrow()
    counts = np.zeros(log.items.num_rows, dtype=np.int64)
    counts[found["item_index"].to_numpy()] = found["n"].to_numpy()
    items = log.items.append_column("train_count", pa.array(counts))
    pq.write_table(items, folder / "items.parquet", compression="zstd")


def _write_exposed(
    log: LogSource, query: SessionQuery, exposures: Any, candidates: Any, folder: Path
) -> dict[str, Any]:
    """Writes exposed.parquet, what was shown with its feedback; returns the funnel's part."""
    most, columns = query.config.exposed_sessions, query.columns
    flags = [name for name in FLAGS if name in columns]
    if most == 0 or not (flags or "watch_time_ms" in columns):
        why = (
            "exposed_sessions is 0"
            if most == 0
            else "the log has no feedback column (watch_time_ms, "
            f"{', '.join(FLAGS)}), so no reward model can be trained on it"
        )
        return {"sessions": 0, "why": why}
    found = log.connection.keep("onerec_exposed", query.exposed(exposures, candidates))
    all_sessions = int(found.count().to_pyarrow().as_py())
    order = ["period", "user_row", "timestamp", "start", "chunk"]
    found = found.filter(found.place < most).order_by(order)
    found = found.mutate(split=split_name(found.period))
    kept = [*EXPOSED, "watch_time_ms"]
    kept += [name for name in ("duration_ms", *flags) if name in columns]
    log.connection.write_parquet(found.select(kept), folder / "exposed.parquet")
    counts = found.group_by("split").aggregate(n=found.count()).to_pyarrow().to_pylist()
    log.connection.drop("onerec_exposed")
    return {
        "sessions": min(all_sessions, most),
        "of": all_sessions,
        "feedback": [name for name in ("watch_time_ms", *flags) if name in columns],
        **{row["split"]: row["n"] for row in counts},
    }
