"""Phase 3, what a session is: expressions over exposures and users; nothing here runs them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ibis

from onerec.data.config import SessionConfig
from onerec.data.source import LogSource, Rule, SplitRule

TRAIN, VALID, TEST = 0, 1, 2  # periods


def split_name(period: Any) -> Any:
    """The split that a period is."""
    return period.cases((TRAIN, "train"), (VALID, "valid"), else_="test")


def numbered_gaps(rows: Any, user: str, minutes: float) -> Any:
    """Adds `key`: a number that grows by one after each pause of more than `minutes`."""
    order = [rows.timestamp, rows.row]
    pause = rows.timestamp - rows.timestamp.lag().over(group_by=rows[user], order_by=order)
    rows = rows.mutate(pause=(pause > round(minutes * 60_000)).fill_null(False).cast("int32"))
    window = ibis.cumulative_window(group_by=rows[user], order_by=[rows.timestamp, rows.row])
    return rows.mutate(key=rows.pause.sum().over(window)).drop("pause")


@dataclass(frozen=True)
class SessionQuery:
    """Sessions of one log.

    Args:
        config: What a session is; `length` is settled.
        rule: Of the config, settled.
        split: Of the config, settled.
        cuts: When valid and test begin with the split "time", in ms; else None.
        columns: Those of the log.
        collect: The engine's `Connection.collect`.
    """

    config: SessionConfig
    rule: Rule
    split: SplitRule
    cuts: tuple[int, int] | None
    columns: Sequence[str]
    collect: Callable[..., Any]

    @property
    def length(self) -> int:
        """m."""
        assert self.config.length is not None
        return self.config.length

    def sequences(self, users: Any, positives: Any) -> Any:
        """The positive exposures of each user in order, empty lists where there are none."""
        order = [positives.timestamp, positives.row]
        found = positives.group_by("user_row").aggregate(
            items=self.collect(positives.item_index, order),
            timestamps=self.collect(positives.timestamp, order),
        )
        return (
            users.left_join(found, "user_row")
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

    def candidates(self, exposures: Any) -> Any:
        """Sessions before any is dropped.

        user_row, key, start, timestamp, period, target, watch_time_ms, watched and interactions;
        whether they are `good`, whether one `straddles` two periods, and how many positive rows
        each `covers` that no other one does.
        """
        if self.rule == "next":
            return self._windows(exposures.filter(exposures.positive))
        return self._groups(exposures)

    def criteria(self) -> dict[str, tuple[str, int]]:
        """The criteria that the log has columns for: name -> (column of a session, least value)."""
        config, tests = self.config, {}
        if "long_view" in self.columns or "watch_time_ms" in self.columns:
            tests["watched"] = ("watched", config.min_watched)
        if "watch_time_ms" in self.columns:
            tests["watch time"] = ("watch_time_ms", round(config.min_watch_seconds * 1000))
        if any(name in self.columns for name in config.interactions):
            tests["interactions"] = ("interactions", config.min_interactions)
        return tests

    def train_positives(self, positives: Any, candidates: Any) -> Any:
        """Positive exposures of the train period: all that counts and co-occurrence may see."""
        if self.split == "last" and self.rule != "next":
            cut = candidates.group_by("user_row").aggregate(valid_from=candidates.valid_from.min())
            rows = positives.left_join(cut, "user_row")
            rows = rows.filter(rows.valid_from.isnull() | (rows.timestamp < rows.valid_from))
        else:
            rows = self.in_order(positives)
            rows = rows.filter(rows.period == TRAIN)
        return rows.select("user_row", "item_index", "timestamp", "row")

    def _windows(self, positives: Any) -> Any:
        """The rule "next": windows of `length` positive exposures in one period of one user."""
        config = self.config
        rows = self.in_order(positives)
        group, order = [rows.user_row, rows.period], rows["at"]
        window = ibis.window(group_by=group, order_by=order, preceding=0, following=self.length - 1)
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
        stride = ibis.ifelse(rows.period == TRAIN, config.stride, self.length)
        rows = rows.filter(rows.nth % stride == 0)
        return rows.mutate(
            target=_distinct(rows.target),
            covers=ibis.least(rows.target.length(), stride).cast("int32"),
            key=rows.start,
            chunk=ibis.literal(0),
            straddles=False,
            good=True,
        ).drop("nth")

    def _groups(self, exposures: Any) -> Any:
        """Rows that share a request id, a session id or a run without a long pause, cut into
        windows of `length` targets."""
        config = self.config
        rows = self.keyed(exposures)
        if self.split == "last":
            rows = rows.mutate(period=ibis.literal(TRAIN, type="int8"))
        wanted = rows.positive if config.target == "positive" else ~ibis.literal(False)
        rows = rows.mutate(wanted=wanted)
        so_far = ibis.cumulative_window(
            group_by=[rows.user_row, rows.key], order_by=[rows.timestamp, rows.row]
        )
        nth = rows.wanted.cast("int32").sum().over(so_far)
        rows = rows.mutate(chunk=ibis.greatest(nth - 1, 0) // self.length)
        groups = rows.group_by(["user_row", "key", "chunk"]).aggregate(
            timestamp=rows.timestamp.min(),
            end=rows.timestamp.max(),
            start=rows.before.min().cast("int32"),
            first_period=rows.period.min(),
            period=rows.period.max(),
            target=self.collect(rows.item_index, [rows.timestamp, rows.row], where=rows.wanted),
            covers=rows.positive.cast("int32").sum().cast("int32"),
            watch_time_ms=rows.watch_time_ms.sum().cast("int64"),
            watched=rows.watched.cast("int32").sum().cast("int32"),
            interactions=rows.interacted.cast("int32").sum().cast("int32"),
        )
        empty = ibis.literal([], type="array<int32>")
        groups = groups.mutate(
            target=_distinct(groups.target.fill_null(empty)),
            straddles=groups.first_period != groups.period,
            good=self._good(groups),
        ).drop("first_period")
        return (self._last_out(groups) if self.split == "last" else groups).drop("end")

    def _good(self, groups: Any) -> Any:
        """Whether the criteria hold for all windows of a group together."""
        tests = [
            groups[column].sum().over(group_by=[groups.user_row, groups.key]).fill_null(0) >= least
            for column, least in self.criteria().values()
        ]
        if not tests:
            return ~ibis.literal(False)
        return functools.reduce(
            operator.or_ if self.config.require == "any" else operator.and_, tests
        )

    def _last_out(self, groups: Any) -> Any:
        """Leave-last-out over sessions: only those that can be kept take part in the ranking."""
        usable = groups.good & (groups.target.length() > 0)
        usable = usable & (groups.start >= self.config.min_history)
        group = [groups.user_row, groups.key]
        groups = groups.mutate(
            usable=usable.cast("int8").max().over(group_by=group),
            begin=groups.timestamp.min().over(group_by=group),
        )
        groups = groups.mutate(
            back=ibis.dense_rank().over(
                group_by=[groups.user_row, groups.usable],
                order_by=[ibis.desc(groups.begin), groups.key],
            )
        )
        usable_count = 1 + groups.back.max(where=groups.usable == 1).over(group_by=groups.user_row)
        ranked = (groups.usable == 1) & (usable_count >= 3)
        groups = groups.mutate(
            period=ibis.cases(
                (ranked & (groups.back == 0), TEST),
                (ranked & (groups.back == 1), VALID),
                else_=TRAIN,
            )
        )
        cut = {
            period: groups.timestamp.min(where=groups.period == period).over(
                group_by=groups.user_row
            )
            for period in (VALID, TEST)
        }
        groups = groups.mutate(valid_from=cut[VALID], test_from=cut[TEST])
        over = ((groups.period == TRAIN) & (groups.end >= groups.valid_from)) | (
            (groups.period == VALID) & (groups.end >= groups.test_from)
        )
        return groups.mutate(straddles=over.fill_null(False)).drop("usable", "begin", "back")

    def keyed(self, exposures: Any) -> Any:
        """Adds `key`, which the rows of a session share, and `before`, the user's positive
        exposures at earlier times; with cuts also `period`."""
        if self.rule == "gap":
            rows = numbered_gaps(exposures, "user_row", self.config.gap_minutes)
        elif self.rule == "next":
            rows = exposures.mutate(key=ibis.literal(0))
        else:
            rows = exposures.mutate(key=exposures[f"{self.rule}_id"])
        if self.cuts is not None:
            rows = rows.mutate(period=self._timed(rows.timestamp))
        earlier = ibis.range_window(
            preceding=(None, 1), group_by=rows.user_row, order_by=rows.timestamp
        )
        return rows.mutate(before=rows.positive.cast("int32").sum().over(earlier).fill_null(0))

    def in_order(self, positives: Any) -> Any:
        """Adds `at`, the place in the user's sequence, and `period`."""
        user, order = positives.user_row, [positives.timestamp, positives.row]
        rows = positives.mutate(
            at=ibis.row_number().over(group_by=user, order_by=order),
            size=positives.count().over(group_by=user),
        )
        if self.split == "column":
            return rows
        if self.cuts is not None:
            return rows.mutate(period=self._timed(rows.timestamp))
        long_enough, left = rows["size"] >= 3, rows["size"] - 1 - rows["at"]
        period = ibis.cases(
            (long_enough & (left == 0), TEST), (long_enough & (left == 1), VALID), else_=TRAIN
        )
        return rows.mutate(period=period)

    def _timed(self, timestamp: Any) -> Any:
        """The period of a time by the cuts."""
        assert self.cuts is not None
        valid, test = self.cuts
        return (timestamp >= valid).cast("int8") + (timestamp >= test).cast("int8")


def session_query(
    log: LogSource,
    config: SessionConfig,
    rule: Rule,
    split: SplitRule,
    cuts: tuple[int, int] | None = None,
) -> SessionQuery:
    """The query of one log; arguments as of `SessionQuery`."""
    return SessionQuery(config, rule, split, cuts, log.interactions.columns, log.connection.collect)


def _distinct(items: Any) -> Any:
    """A session's items without repeats: a catalogue item stands once in it."""
    return items.filter(lambda item, at: items.index(item) == at)
