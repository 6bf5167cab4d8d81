"""Phase 1, the rows of a log with indices and with what the user thought of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ibis

from onerec.data.config import SessionConfig
from onerec.data.schema import FLAGS
from onerec.data.sessions.windows import TEST, TRAIN, VALID
from onerec.data.source import LogSource


@dataclass(frozen=True)
class Exposures:
    """Ibis tables, and what was counted on making them.

    Attributes:
        table: user_row, item_index, timestamp, row, watch_time_ms, watched, interacted, positive;
            period where the log has a split; ids, duration and flags that the log has.
        users: user_row, user_id.
        in_log: Rows of the log.
        known: Rows of these whose item is known.
    """

    table: Any
    users: Any
    in_log: int
    known: int

    @property
    def positives(self) -> Any:
        """The positive rows of `table`."""
        return self.table.filter(self.table.positive)


def read_exposures(log: LogSource, config: SessionConfig) -> Exposures:
    """Makes the temporary tables onerec_items, onerec_users and onerec_exposures.

    Raises:
        DataError: Item ids of another type than the items table's, or unknown items.
    """
    t = log.interactions
    total = int(t.count().to_pyarrow().as_py())
    items = log.connection.keep("onerec_items", log.items.select(["item_index", "item_id"]))
    if t.item_id.type().is_string() != items.item_id.type().is_string():
        raise log.table.bad(
            f"wanted the type of the items table ({items.item_id.type()}), got {t.item_id.type()}",
            column="item_id",
        )
    unknown = t.anti_join(items, "item_id")
    stray = unknown.aggregate(n=unknown.count(), row=unknown.row.min()).to_pyarrow().to_pylist()[0]
    if stray["n"]:
        if config.unknown_items == "refuse":
            first = unknown.filter(unknown.row == stray["row"]).item_id.to_pyarrow()[0].as_py()
            raise log.table.bad(
                f"item {first} is not in the items table ({stray['n']:,} such rows of {total:,}; "
                "--sessions.unknown_items drop, or unknown_items='drop' in Python, drops them)",
                column="item_id",
                row=stray["row"],
            )
        t = t.semi_join(items, "item_id")
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
        chosen["period"] = t.split.cases(("valid", VALID), ("test", TEST), else_=TRAIN)
    for name in ("request_id", "session_id", "duration_ms", *FLAGS):
        if name in t.columns:
            chosen[name] = t[name]
    table = log.connection.keep("onerec_exposures", t.select(**chosen))
    return Exposures(table, users, total, total - stray["n"])


def _feedback(t: Any, config: SessionConfig) -> dict[str, Any]:
    """Whether an exposure was really watched, interacted with, and positive."""
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
