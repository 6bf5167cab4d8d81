"""High-quality sessions from a log: one relational query, run by DuckDB through Ibis.

What a session is follows section 2.1 of arXiv 2502.18965: the videos of one request, kept when
the user really watched enough of them, watched long enough in all, or interacted.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.config import SessionConfig
from onerec.data.schema import FLAGS, bad
from onerec.data.session_set import SPLITS, SessionSet, list_values
from onerec.data.source import LogSource, Rule, SplitRule
from onerec.data.vectors import FILL_RULE, align, cooccurrence_vectors, fill
from onerec.errors import DataError, OneRecError
from onerec.files import atomic_directory

_TRAIN, _VALID, _TEST = 0, 1, 2


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
        out_dir: The folder to write; an earlier one is replaced.
        progress: Called as progress(steps done, steps, what comes now).

    Raises:
        DataError: Items of the log are unknown, or a split is left without sessions.
        OneRecError: Memory or disk ran out.
        ValueError: The config asks for what the log does not have.
    """
    import duckdb

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
    import ibis

    def tell(done: int, what: str) -> None:
        if progress is not None:
            progress(done, 5, what)

    tell(0, "reading exposures")
    collect = log.connection.collect
    rule, reason = _rule(log, config)
    split = log.default_split if config.split == "auto" else config.split
    if split == "column" and "split" not in log.interactions.columns:
        raise ValueError("split: wanted a log with a column split, got one without")
    if split == "time" and log.time == "position":
        raise ValueError("split: 'time' needs timestamps, which this log does not have")
    funnel: dict[str, Any] = {
        "log": {"kind": log.kind, "path": str(log.path), "time": log.time, **log.found},
        "rule": rule,
        "rule_reason": reason,
        "config": asdict(config),
    }

    steps: list[dict[str, Any]] = []
    items = log.connection.keep("onerec_items", log.items.select(["item_index", "item_id"]))
    users = _exposures(log, config, items, steps)
    exposures = log.connection.backend.table("onerec_exposures")
    if split == "column":
        _check_order(log, exposures)
    funnel["users"], funnel["items"] = int(users.count().to_pyarrow().as_py()), log.items.num_rows
    positives = exposures.filter(exposures.positive)
    steps.append(_step("positive exposures", "exposures", positives.count().to_pyarrow().as_py()))

    cuts = None
    if split == "time":
        cuts = _cuts(log, config, positives)
    funnel["split"] = {"rule": split, "time": log.time}
    if cuts is not None:
        funnel["split"] |= {"valid_from": cuts[0], "test_from": cuts[1]}

    tell(1, "forming sessions")
    candidates = (
        _windows(positives, config, split, cuts)
        if rule == "next"
        else _groups(exposures, log.interactions.columns, config, rule, split, cuts, collect)
    )
    candidates = log.connection.keep("onerec_candidates", candidates)
    kept, session_steps, counts = _keep(candidates, config, rule)
    steps += session_steps
    if rule == "next":
        funnel["criteria"] = "every exposure of a window is really watched or interacted with"
    else:
        funnel["criteria"] = {
            "require": config.require,
            "tested": list(_criteria(log.interactions.columns, config)),
        }
    funnel["steps"] = steps
    funnel["sessions"] = counts
    for name in SPLITS:
        if not counts[name]:
            told = "; ".join(f"{step['count']:,} {step['step']}" for step in steps)
            raise DataError(f"{log.path}: no {name} session is left ({told})")

    tell(2, "writing sequences")
    with atomic_directory(out_dir) as folder:
        sequences = (
            users.left_join(
                positives.group_by("user_row").aggregate(
                    items=collect(positives.item_index, [positives.timestamp, positives.row]),
                    timestamps=collect(positives.timestamp, [positives.timestamp, positives.row]),
                ),
                "user_row",
            )
            .select(
                "user_row",
                "user_id",
                items=lambda t: t["items"].fill_null(ibis.literal([], type="array<int32>")),
                timestamps=lambda t: t["timestamps"].fill_null(
                    ibis.literal([], type="array<int64>")
                ),
            )
            .order_by("user_row")
        )
        log.connection.write_parquet(sequences, folder / "sequences.parquet")
        tell(3, "writing sessions")
        log.connection.write_parquet(kept, folder / "sessions.parquet")

        train = _train_positives(positives, candidates, rule, split, cuts)
        train = log.connection.keep("onerec_train", train)
        per_item = train.group_by("item_index").aggregate(n=train.count()).to_pyarrow()
        train_count = np.zeros(log.items.num_rows, dtype=np.int64)
        train_count[per_item["item_index"].to_numpy()] = per_item["n"].to_numpy()
        pq.write_table(
            log.items.append_column("train_count", pa.array(train_count)),
            folder / "items.parquet",
            compression="zstd",
        )
        funnel["exposed"] = _write_exposed(
            log, config, rule, split, cuts, exposures, candidates, folder
        )
        tell(4, "item vectors")
        vectors, funnel["embeddings"] = _vectors(log, config, train)
        np.save(folder / "embeddings.npy", vectors)
        (folder / "funnel.json").write_text(json.dumps(funnel, indent=2, ensure_ascii=False))
        for table in ("items", "users", "exposures", "candidates", "train"):
            log.connection.drop(f"onerec_{table}")
    tell(5, "done")


def _step(name: str, unit: str, count: Any) -> dict[str, Any]:
    return {"step": name, "unit": unit, "count": int(count)}


def _rule(log: LogSource, config: SessionConfig) -> tuple[Rule, str]:
    columns = log.interactions.columns
    if config.rule == "request" and "request_id" not in columns:
        raise ValueError("rule: 'request' needs a column request_id, which this log lacks")
    if config.rule == "session" and "session_id" not in columns:
        raise ValueError("rule: 'session' needs a column session_id, which this log lacks")
    if config.rule == "gap" and log.time != "ms":
        raise ValueError(f"rule: 'gap' needs the time of every row, this log has {log.time!r}")
    if config.rule != "auto":
        return config.rule, "asked for"
    if log.default_rule is not None:
        return log.default_rule
    if "request_id" in columns:
        return "request", "the log has request ids"
    if "session_id" in columns:
        return "session", "the log has session ids"
    rows = _numbered_gaps(log.interactions, "user_id", config.gap_minutes)
    sizes = rows.group_by(["user_id", "key"]).aggregate(n=rows.count())
    n = sizes.n
    share = sizes.aggregate(share=n.sum(where=n >= config.length) / n.sum()).to_pyarrow()
    share = share["share"][0].as_py() or 0.0
    told = (
        f"{share:.0%} of the rows lie in runs of {config.length} or more with pauses of at most "
        f"{config.gap_minutes:g} minutes"
    )
    if share >= 0.5:
        return "gap", f"the log has no request or session ids; {told}"
    return "next", f"the log has no request or session ids, and only {told}"


def _numbered_gaps(rows: Any, user: str, minutes: float) -> Any:
    """Adds `key`: a number that grows by one after each pause of more than `minutes`."""
    import ibis

    order = [rows.timestamp, rows.row]
    pause = rows.timestamp - rows.timestamp.lag().over(group_by=rows[user], order_by=order)
    rows = rows.mutate(pause=(pause > round(minutes * 60_000)).fill_null(False).cast("int32"))
    window = ibis.cumulative_window(group_by=rows[user], order_by=[rows.timestamp, rows.row])
    return rows.mutate(key=rows.pause.sum().over(window)).drop("pause")


def _feedback(t: Any, config: SessionConfig) -> dict[str, Any]:
    """Whether an exposure was really watched, interacted with, and positive."""
    import ibis

    columns = t.columns
    flags = [name for name in config.interactions if name in columns]
    interacted = ibis.literal(False)
    for name in flags:
        interacted = interacted | (t[name] == 1).fill_null(False)
    enough = round(config.really_watched_seconds * 1000)
    if "long_view" in columns:
        watched = (t.long_view == 1).fill_null(False)
    elif "watch_time_ms" in columns:
        needed = ibis.literal(enough)
        if "duration_ms" in columns:
            needed = ibis.least(t.duration_ms.nullif(0).fill_null(enough), enough)
        watched = (t.watch_time_ms >= needed).fill_null(False)
    else:
        # A log of choices alone (purchases, reviews): each row is one; with flags, only those.
        watched = ibis.literal(not flags)
    positive = watched | interacted
    if "hate" in columns:
        positive = positive & ~(t.hate == 1).fill_null(False)
    return {"watched": watched, "interacted": interacted, "positive": positive}


def _exposures(
    log: LogSource, config: SessionConfig, items: Any, steps: list[dict[str, Any]]
) -> Any:
    """Makes the table onerec_exposures (rows with indices and feedback); returns the users."""
    t = log.interactions
    total = int(t.count().to_pyarrow().as_py())
    steps.append(_step("rows in the log", "exposures", total))
    if t.item_id.type().is_string() != items.item_id.type().is_string():
        raise bad(
            log.interactions_path,
            f"wanted the type of the items table ({items.item_id.type()}), got {t.item_id.type()}",
            column="item_id",
        )
    unknown = t.anti_join(items, "item_id")
    stray = unknown.aggregate(n=unknown.count(), row=unknown.row.min()).to_pyarrow().to_pylist()[0]
    if stray["n"]:
        if config.unknown_items == "refuse":
            first = unknown.filter(unknown.row == stray["row"]).item_id.to_pyarrow()[0].as_py()
            raise bad(
                log.interactions_path,
                f"item {first} is not in the items table ({stray['n']:,} such rows of {total:,}; "
                "--sessions.unknown_items drop, or unknown_items='drop' in Python, drops them)",
                column="item_id",
                row=stray["row"],
            )
        t = t.semi_join(items, "item_id")
    steps.append(_step("rows with a known item", "exposures", total - stray["n"]))

    import ibis

    distinct = t.select("user_id").distinct()
    users = distinct.mutate(
        user_row=ibis.row_number().over(order_by=distinct.user_id).cast("int32")
    ).select("user_row", "user_id")
    users = log.connection.keep("onerec_users", users)
    t = t.inner_join(items, "item_id").inner_join(users, "user_id")
    chosen = {
        "user_row": t.user_row,
        "item_index": t.item_index,
        "timestamp": t.timestamp,
        "row": t.row,
        "watch_time_ms": t.watch_time_ms if "watch_time_ms" in t.columns else ibis.null("int64"),
        **_feedback(t, config),
    }
    if "split" in t.columns:
        chosen["period"] = t.split.cases(("valid", _VALID), ("test", _TEST), else_=_TRAIN)
    for name in ("request_id", "session_id", "duration_ms", *FLAGS):
        if name in t.columns:
            chosen[name] = t[name]
    log.connection.keep("onerec_exposures", t.select(**chosen))
    return users


def _check_order(log: LogSource, exposures: Any) -> None:
    """Refuses a split column that goes back in time: its histories would hold the future."""
    before = exposures.period.lag().over(
        group_by=exposures.user_row, order_by=[exposures.timestamp, exposures.row]
    )
    rows = exposures.mutate(before=before)
    at = rows.filter(rows.period < rows.before).row.min().to_pyarrow().as_py()
    if at is not None:
        raise bad(
            log.interactions_path,
            "wanted each user's rows in the order train, valid, test by time, got an earlier "
            "split after a later one",
            column="split",
            row=at,
        )


def _milliseconds(name: str, value: str | int) -> int:
    if isinstance(value, int):
        return value
    try:
        time = datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"{name}: wanted an ISO time or milliseconds, got {value!r}") from error
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def _cuts(log: LogSource, config: SessionConfig, positives: Any) -> tuple[int, int]:
    if config.valid_from is not None and config.test_from is not None:
        valid = _milliseconds("valid_from", config.valid_from)
        test = _milliseconds("test_from", config.test_from)
        if valid >= test:
            raise ValueError(
                f"valid_from, test_from: wanted the first before the second, got {valid}, {test}"
            )
        return valid, test
    if log.default_cuts is not None:
        return log.default_cuts
    found = positives.aggregate(
        valid=positives.timestamp.quantile(1 - config.valid_fraction - config.test_fraction),
        test=positives.timestamp.quantile(1 - config.test_fraction),
    ).to_pyarrow()
    values = [found[name][0].as_py() for name in ("valid", "test")]
    if None in values:
        raise DataError(f"{log.path}: no exposure is positive, so no session can be built")
    return int(values[0]), int(values[1])


def _period(timestamp: Any, cuts: tuple[int, int]) -> Any:
    return (timestamp >= cuts[0]).cast("int8") + (timestamp >= cuts[1]).cast("int8")


def _ordered(positives: Any) -> Any:
    """Adds `at`, the place in the user's sequence, and `left`, how many follow."""
    import ibis

    user, order = positives.user_row, [positives.timestamp, positives.row]
    return positives.mutate(
        at=ibis.row_number().over(group_by=user, order_by=order),
        size=positives.count().over(group_by=user),
    ).mutate(left=lambda t: t.size - 1 - t.at)


def _with_period(positives: Any, split: SplitRule, cuts: tuple[int, int] | None) -> Any:
    """Adds `period` (0 train, 1 valid, 2 test) to ordered positive exposures."""
    import ibis

    if split == "column":
        return positives
    if cuts is not None:
        return positives.mutate(period=_period(positives.timestamp, cuts))
    long_enough = positives.size >= 3
    period = ibis.cases(
        (long_enough & (positives.left == 0), _TEST),
        (long_enough & (positives.left == 1), _VALID),
        else_=_TRAIN,
    )
    return positives.mutate(period=period)


def _windows(
    positives: Any, config: SessionConfig, split: SplitRule, cuts: tuple[int, int] | None
) -> Any:
    """The rule "next": windows of `length` positive exposures inside one period of one user."""
    import ibis

    rows = _with_period(_ordered(positives), split, cuts)
    group, order = [rows.user_row, rows.period], rows["at"]
    window = ibis.window(group_by=group, order_by=order, preceding=0, following=config.length - 1)
    rows = rows.select(
        "user_row",
        "timestamp",
        "period",
        start=rows["at"].cast("int32"),
        nth=ibis.row_number().over(group_by=group, order_by=order),
        target=rows.item_index.collect().over(window),
        watch_time_ms=rows.watch_time_ms.sum().over(window).cast("int64"),
        watched=rows.watched.cast("int32").sum().over(window).cast("int32"),
        interactions=rows.interacted.cast("int32").sum().over(window).cast("int32"),
    )
    stride = ibis.ifelse(rows.period == _TRAIN, config.stride, config.length)
    rows = rows.filter(rows.nth % stride == 0)
    # A catalogue item stands once in a session, so a repeat inside the window is left out.
    target = rows.target.filter(lambda item, at: rows.target.index(item) == at)
    return rows.mutate(target=target, key=rows.start, straddles=False, good=True).drop("nth")


def _groups(
    exposures: Any,
    columns: Any,
    config: SessionConfig,
    rule: Rule,
    split: SplitRule,
    cuts: tuple[int, int] | None,
    collect: Callable[..., Any],
) -> Any:
    """Sessions of rows that share a request id, a session id or a run without a long pause."""
    import ibis

    rows = exposures
    if rule == "gap":
        rows = _numbered_gaps(rows, "user_row", config.gap_minutes)
    else:
        rows = rows.mutate(key=rows[f"{rule}_id"])
    if cuts is not None:
        rows = rows.mutate(period=_period(rows.timestamp, cuts))
    elif split == "last":
        rows = rows.mutate(period=ibis.literal(_TRAIN, type="int8"))
    before = ibis.range_window(preceding=(None, 1), group_by=rows.user_row, order_by=rows.timestamp)
    rows = rows.mutate(before=rows.positive.cast("int32").sum().over(before).fill_null(0))
    wanted = rows.positive if config.target == "positive" else ~ibis.literal(False)
    groups = rows.group_by(["user_row", "key"]).aggregate(
        timestamp=rows.timestamp.min(),
        end=rows.timestamp.max(),
        start=rows.before.min().cast("int32"),
        first_period=rows.period.min(),
        period=rows.period.max(),
        target=collect(rows.item_index, [rows.timestamp, rows.row], where=wanted),
        watch_time_ms=rows.watch_time_ms.sum().cast("int64"),
        watched=rows.watched.cast("int32").sum().cast("int32"),
        interactions=rows.interacted.cast("int32").sum().cast("int32"),
    )
    empty = ibis.literal([], type="array<int32>")
    target = groups.target.fill_null(empty)
    groups = groups.mutate(target=target)
    target = groups.target.filter(lambda item, at: groups.target.index(item) == at)
    tests = [
        groups[column].fill_null(0) >= least
        for column, least in _criteria(columns, config).values()
    ]
    good = functools.reduce(operator.or_ if config.require == "any" else operator.and_, tests)
    groups = groups.mutate(
        target=target[: config.length], good=good, straddles=groups.first_period != groups.period
    ).drop("first_period")
    if split != "last":
        return groups.drop("end")
    # Leave-last-out over sessions: only those that can be kept take part in the ranking.
    usable = groups.good & (groups.target.length() > 0) & (groups.start >= config.min_history)
    back = ibis.row_number().over(
        group_by=[groups.user_row, usable], order_by=[ibis.desc(groups.timestamp), groups.key]
    )
    groups = groups.mutate(usable=usable, back=back)
    usable_count = groups.usable.cast("int32").sum().over(group_by=groups.user_row)
    ranked = groups.usable & (usable_count >= 3)
    groups = groups.mutate(
        period=ibis.cases(
            (ranked & (groups.back == 0), _TEST),
            (ranked & (groups.back == 1), _VALID),
            else_=_TRAIN,
        )
    )
    cut = {
        period: groups.timestamp.min(where=groups.period == period).over(group_by=groups.user_row)
        for period in (_VALID, _TEST)
    }
    groups = groups.mutate(valid_from=cut[_VALID], test_from=cut[_TEST])
    over = ((groups.period == _TRAIN) & (groups.end >= groups.valid_from)) | (
        (groups.period == _VALID) & (groups.end >= groups.test_from)
    )
    return groups.mutate(straddles=over.fill_null(False)).drop("end", "usable", "back")


def _criteria(columns: Any, config: SessionConfig) -> dict[str, tuple[str, int]]:
    """The criteria that the log has columns for: name -> (column of a session, least value)."""
    tests = {"watched": ("watched", config.min_watched)}
    if "watch_time_ms" in columns:
        tests["watch time"] = ("watch_time_ms", round(config.min_watch_seconds * 1000))
    if any(name in columns for name in config.interactions):
        tests["interactions"] = ("interactions", config.min_interactions)
    return tests


def _train_positives(
    positives: Any,
    candidates: Any,
    rule: Rule,
    split: SplitRule,
    cuts: tuple[int, int] | None,
) -> Any:
    """Positive exposures of the train period: all that counts and co-occurrence may see."""
    if split == "last" and rule != "next":
        cut = candidates.group_by("user_row").aggregate(valid_from=candidates.valid_from.min())
        rows = positives.left_join(cut, "user_row")
        rows = rows.filter(rows.valid_from.isnull() | (rows.timestamp < rows.valid_from))
    else:
        rows = _with_period(_ordered(positives), split, cuts)
        rows = rows.filter(rows.period == _TRAIN)
    return rows.select("user_row", "item_index", "timestamp", "row")


def _keep(
    candidates: Any, config: SessionConfig, rule: Rule
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
    steps.append(
        _step(
            f"sessions with a history of {config.min_history} or more", "sessions", counted["kept"]
        )
    )
    rows = c.filter(kept).order_by(["period", "user_row", "timestamp", "start", "key"])
    rows = rows.select(
        "user_row",
        "start",
        "timestamp",
        "target",
        "watch_time_ms",
        "watched",
        "interactions",
        split=rows.period.cases((_TRAIN, "train"), (_VALID, "valid"), else_="test"),
    ).select(
        "user_row",
        "start",
        "split",
        "timestamp",
        "target",
        "watch_time_ms",
        "watched",
        "interactions",
    )
    return rows, steps, {name: counted[name] for name in SPLITS}


def _write_exposed(
    log: LogSource,
    config: SessionConfig,
    rule: Rule,
    split: SplitRule,
    cuts: tuple[int, int] | None,
    exposures: Any,
    candidates: Any,
    folder: Path,
) -> dict[str, Any]:
    """Writes exposed.parquet, what was shown with its feedback; returns the funnel's part."""
    columns = log.interactions.columns
    flags = [name for name in FLAGS if name in columns]
    if config.exposed_sessions == 0 or not (flags or "watch_time_ms" in columns):
        why = (
            "exposed_sessions is 0"
            if config.exposed_sessions == 0
            else "the log has no feedback column (watch_time_ms, "
            f"{', '.join(FLAGS)}), so no reward model can be trained on it"
        )
        return {"sessions": 0, "why": why}
    found = _exposed(exposures, candidates, config, rule, split, cuts, log.connection.collect)
    found = log.connection.keep("onerec_exposed", found)
    all_sessions = int(found.count().to_pyarrow().as_py())
    found = found.filter(found.place < config.exposed_sessions)
    kept = ["user_row", "start", "split", "timestamp", "items", "watch_time_ms"]
    kept += [name for name in ("duration_ms", *flags) if name in columns]
    order = ["period", "user_row", "timestamp", "start", "chunk"]
    found = found.order_by(order).mutate(
        split=found.period.cases((_TRAIN, "train"), (_VALID, "valid"), else_="test")
    )
    log.connection.write_parquet(found.select(kept), folder / "exposed.parquet")
    counts = found.group_by("split").aggregate(n=found.count()).to_pyarrow().to_pylist()
    log.connection.drop("onerec_exposed")
    return {
        "sessions": min(all_sessions, config.exposed_sessions),
        "of": all_sessions,
        "feedback": [name for name in ("watch_time_ms", *flags) if name in columns],
        **{row["split"]: row["n"] for row in counts},
    }


def _exposed(
    exposures: Any,
    candidates: Any,
    config: SessionConfig,
    rule: Rule,
    split: SplitRule,
    cuts: tuple[int, int] | None,
    collect: Callable[..., Any],
) -> Any:
    """What was shown, in runs of at most `length` exposures of one request and one period.

    With the rule "next" a run is the user's next `length` exposures, good or not.
    """
    import ibis

    rows = exposures
    if rule == "gap":
        rows = _numbered_gaps(rows, "user_row", config.gap_minutes)
    elif rule == "next":
        rows = rows.mutate(key=ibis.literal(0))
    else:
        rows = rows.mutate(key=rows[f"{rule}_id"])
    if cuts is not None:
        rows = rows.mutate(period=_period(rows.timestamp, cuts))
    elif split == "last":
        begins = candidates.group_by("user_row").aggregate(
            valid_begins=candidates.timestamp.min(where=candidates.period == _VALID),
            test_begins=candidates.timestamp.min(where=candidates.period == _TEST),
        )
        rows = rows.left_join(begins, "user_row").drop("user_row_right")
        late = [(rows.timestamp >= rows[f"{name}_begins"]) for name in ("valid", "test")]
        rows = rows.mutate(
            period=late[0].fill_null(False).cast("int8") + late[1].fill_null(False).cast("int8")
        )
    before = ibis.range_window(preceding=(None, 1), group_by=rows.user_row, order_by=rows.timestamp)
    order = [rows.timestamp, rows.row]
    inside = [rows.user_row, rows.key, rows.period]
    rows = rows.mutate(
        before=rows.positive.cast("int32").sum().over(before).fill_null(0),
        chunk=ibis.row_number().over(group_by=inside, order_by=order) // config.length,
    )
    feedback = [name for name in ("watch_time_ms", "duration_ms", *FLAGS) if name in rows.columns]
    order = [rows.timestamp, rows.row]
    runs = rows.group_by(["user_row", "key", "period", "chunk"]).aggregate(
        timestamp=rows.timestamp.min(),
        start=rows.before.min().cast("int32"),
        known=(rows.watch_time_ms.count() > 0).cast("int8"),
        items=collect(rows.item_index, order),
        **{
            name: collect(rows[name].cast("float32"), order, include_null=True) for name in feedback
        },
    )
    # A number of its own for each run, scattered by a congruential step: the even sample.
    number = ibis.row_number().over(order_by=["user_row", "key", "period", "chunk"])
    runs = runs.mutate(number=number)
    scattered = (runs.number % 2147483648) * 1103515245 % 2147483648
    runs = runs.mutate(scattered=scattered)
    return runs.mutate(
        place=ibis.row_number().over(order_by=[ibis.desc(runs.known), runs.scattered])
    )


def _vectors(
    log: LogSource, config: SessionConfig, train: Any
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Item vectors [N, d] and what the funnel says of them."""
    tags = [tags[0] if tags else None for tags in log.items["tags"].to_pylist()]
    name = config.embeddings
    if name == "auto":
        name = next(iter(log.vectors), "cooccurrence")
    parts, about = [], []
    filled = np.zeros(log.items.num_rows, dtype=np.bool_)
    for part in name.split("+"):
        if part == "cooccurrence":
            vectors, known = _cooccurrence(log, config, train)
            vectors = fill(vectors, known, tags, config.seed)
            about.append("co-occurrence in train sequences (PPMI, truncated SVD)")
        elif part in log.vectors:
            file = log.vectors[part]
            vectors, known = align(file, log.items["item_id"].to_numpy(), tags, config.seed)
            about.append(file.about)
        else:
            names = ", ".join(["auto", "cooccurrence", *log.vectors])
            raise ValueError(
                f"embeddings: wanted one of {names}, or several joined by '+', got {name!r}"
            )
        filled |= ~known
        parts.append(vectors)
    if len(parts) > 1:
        # Centred and of equal mean square, so that no part outweighs the others.
        centred = [part - part.mean(axis=0) for part in parts]
        parts = [part / np.sqrt((part**2).sum(axis=1).mean()) for part in centred]
    vectors = np.concatenate(parts, axis=1)
    return vectors, {
        "source": name,
        "about": " + ".join(about),
        "dim": vectors.shape[1],
        "filled": int(filled.sum()),
        "fill_rule": FILL_RULE if filled.any() else None,
    }


def _cooccurrence(
    log: LogSource, config: SessionConfig, train: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    sequences = (
        train.group_by("user_row")
        .aggregate(items=log.connection.collect(train.item_index, [train.timestamp, train.row]))
        .order_by("user_row")
        .to_pyarrow()
    )
    values, offsets = list_values(sequences["items"])
    vectors, known = cooccurrence_vectors(
        values,
        offsets,
        log.items.num_rows,
        dim=config.embedding_dim,
        window=config.cooccurrence_window,
        seed=config.seed,
    )
    if not known.any():
        raise DataError(f"{log.path}: no two items co-occur in a user's train sequence")
    return vectors, known
