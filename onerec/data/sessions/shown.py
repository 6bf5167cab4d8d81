"""Phase 5, what was shown, good or not, with its feedback: what a reward model learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis

from onerec.data.schema import FLAGS
from onerec.data.session_set import EXPOSED
from onerec.data.sessions.windows import TEST, VALID, SessionQuery, split_name
from onerec.data.source import LogSource

_RUN = ["user_row", "key", "period", "chunk"]


def write_shown(
    log: LogSource, query: SessionQuery, exposures: Any, candidates: Any, folder: Path
) -> dict[str, Any]:
    """Writes exposed.parquet; returns the funnel's part.

    Of more than `exposed_sessions` runs those with a known watch time come first, then an even
    sample by hash: the lists of the others are never made.
    """
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
    engine = log.connection
    rows = engine.keep("onerec_shown", _numbered(query, exposures, candidates))
    runs = rows.group_by(_RUN).aggregate(
        known=(rows.watch_time_ms.count() > 0).cast("int8"), turn=_hash(rows.user_row, rows.row)
    )
    of = int(runs.count().to_pyarrow().as_py())
    if of > most:
        chosen = runs.order_by([ibis.desc(runs.known), runs.turn, *_RUN]).limit(most)
        rows = rows.semi_join(engine.keep("onerec_chosen", chosen.select(_RUN)), _RUN)
    order = [rows.timestamp, rows.row]
    known = [name for name in ("watch_time_ms", "duration_ms", *flags) if name in rows.columns]
    found = rows.group_by(_RUN).aggregate(
        timestamp=rows.timestamp.min(),
        start=rows.before.min().cast("int32"),
        items=query.collect(rows.item_index, order),
        **{
            name: query.collect(rows[name].cast("float32"), order, include_null=True)
            for name in known
        },
    )
    found = found.order_by(["period", "user_row", "timestamp", "start", "chunk", "key"])
    found = found.mutate(split=split_name(found.period))
    engine.write_parquet(found.select([*EXPOSED, *known]), folder / "exposed.parquet")
    splits = rows.select(_RUN).distinct().mutate(split=split_name(ibis._.period))
    counts = splits.group_by("split").aggregate(n=ibis._.count()).to_pyarrow().to_pylist()
    for table in ("shown", "chosen"):
        engine.drop(f"onerec_{table}")
    return {
        "sessions": min(of, most),
        "of": of,
        "feedback": [name for name in ("watch_time_ms", *flags) if name in columns],
        **{row["split"]: row["n"] for row in counts},
    }


def _numbered(query: SessionQuery, exposures: Any, candidates: Any) -> Any:
    """Adds `chunk`: runs have at most `length` exposures of one request and one period.

    With the rule "next" a run is the user's next `length` exposures, good or not.
    """
    rows = query.keyed(exposures)
    if query.split == "last":
        begins = candidates.group_by("user_row").aggregate(
            valid_begins=candidates.timestamp.min(where=candidates.period == VALID),
            test_begins=candidates.timestamp.min(where=candidates.period == TEST),
        )
        rows = rows.left_join(begins, "user_row").drop("user_row_right")
        late = [rows.timestamp >= rows[f"{name}_begins"] for name in ("valid", "test")]
        rows = rows.mutate(
            period=late[0].fill_null(False).cast("int8") + late[1].fill_null(False).cast("int8")
        )
    inside = [rows.user_row, rows.key, rows.period]
    number = ibis.row_number().over(group_by=inside, order_by=[rows.timestamp, rows.row])
    return rows.mutate(chunk=number // query.length)


def _hash(user_row: Any, row: Any) -> Any:
    """A number in [0, 2^31) of a run, the same on every engine and evenly spread.

    It is the sequence of multiples of 1/p and 1/p^2, p = 1.3247... the plastic number (Roberts,
    R2), of the run's first row and its user.
    """
    return ((row.min() % 2**31) * 1621087495 + user_row.min().cast("int64") * 1223722707) % 2**31
