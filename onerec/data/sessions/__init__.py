"""High-quality sessions from a log: one relational query, run by DuckDB through Ibis.

What a session is follows section 2.1 of arXiv 2502.18965: the videos of one request, kept when
the user really watched enough of them, watched long enough in all, or interacted.

The phases, a file each: `exposures` (rows with indices and feedback), `rules` (what the config
leaves to the log), `windows` (sessions), `targets` (which of them stay, and what their targets
are), `shown` (what a reward model learns from), `item_vectors`.
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
from onerec.data.session_set import COLUMNS, SPLITS, SessionSet
from onerec.data.sessions.exposures import read_exposures
from onerec.data.sessions.item_vectors import item_vectors
from onerec.data.sessions.rules import check_order, settle_length, settle_rule, settle_split
from onerec.data.sessions.shown import write_shown
from onerec.data.sessions.targets import count_repeats, count_targets, keep, step
from onerec.data.sessions.windows import session_query
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
    exposed.parquet where the log has feedback, embeddings.npy, basis.npz, funnel.json
    (docs/data.md).

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
    exposures = read_exposures(log, config)
    positives = exposures.positives
    steps = [
        step("rows in the log", "exposures", exposures.in_log),
        step("rows with a known item", "exposures", exposures.known),
        step("positive exposures", "exposures", positives.count().to_pyarrow().as_py()),
    ]
    rule, reason = settle_rule(log, config, exposures)
    config = settle_length(config, rule)
    split = settle_split(log, config, rule, exposures)
    if split.rule == "column":
        check_order(log, exposures.table)
    query = session_query(log, config, rule, split.rule, split.cuts)

    tell(1, "forming sessions")
    candidates = engine.keep("onerec_candidates", query.candidates(exposures.table))
    kept, session_steps, counts = keep(candidates, config, rule)
    steps += session_steps
    for name in SPLITS:
        if not counts[name]:
            told = "; ".join(f"{one['count']:,} {one['step']}" for one in steps)
            raise DataError(
                f"{log.path}: no {name} session is left ({told}); rule {rule!r} ({reason}), split "
                f"{split.rule!r} ({split.reason}). {_REMEDY}"
            )
    funnel: dict[str, Any] = {
        "log": {"kind": log.kind, "path": str(log.path), "time": log.time, **log.found},
        "rule": rule,
        "rule_reason": reason,
        "length": config.length,
        "config": asdict(config),
        "users": int(exposures.users.count().to_pyarrow().as_py()),
        "items": log.items.num_rows,
        "split": {"rule": split.rule, "reason": split.reason, "time": log.time},
        "criteria": "every exposure of a window is really watched or interacted with"
        if rule == "next"
        else {"require": config.require, "tested": list(query.criteria())},
        "steps": steps,
        "sessions": counts,
        "targets": count_targets(kept, steps[2]["count"]),
        "repeats": count_repeats(kept, positives),
    }
    if split.cuts is not None:
        funnel["split"] |= {"valid_from": split.cuts[0], "test_from": split.cuts[1]}

    tell(2, "writing sequences")
    with atomic_directory(out_dir) as folder:
        sequences = query.sequences(exposures.users, positives)
        engine.write_parquet(sequences, folder / "sequences.parquet")
        tell(3, "writing sessions")
        engine.write_parquet(kept.select(list(COLUMNS["sessions"])), folder / "sessions.parquet")
        train = engine.keep("onerec_train", query.train_positives(positives, candidates))
        _write_items(log, train, folder)
        funnel["exposed"] = write_shown(log, query, exposures.table, candidates, folder)
        tell(4, "item vectors")
        vectors, funnel["embeddings"], basis = item_vectors(log, config, rule, train)
        np.save(folder / "embeddings.npy", vectors)
        np.savez(folder / "basis.npz", **basis)  # type: ignore[arg-type]
        (folder / "funnel.json").write_text(
            json.dumps(funnel, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        for table in ("items", "users", "exposures", "candidates", "train"):
            engine.drop(f"onerec_{table}")
    tell(5, "done")


_REMEDY = (
    "A user's items one by one: rule \"next\" (--sessions.rule next); each user's last session for "
    'test: split "last" (--sessions.split last); users without a history: min_history 0 '
    "(--sessions.min_history 0)"
)


def _write_items(log: LogSource, train: Any, folder: Path) -> None:
    """Writes items.parquet: the log's items with their counts in train."""
    found = train.group_by("item_index").aggregate(n=train.count()).to_pyarrow()
    counts = np.zeros(log.items.num_rows, dtype=np.int64)
    counts[found["item_index"].to_numpy()] = found["n"].to_numpy()
    items = log.items.append_column("train_count", pa.array(counts))
    pq.write_table(items, folder / "items.parquet", compression="zstd")
