"""Phase 2, what the config leaves to the log: the rule, the length, the split and its cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import ibis

from onerec.data.config import SessionConfig
from onerec.data.schema import FLAGS
from onerec.data.sessions.exposures import Exposures
from onerec.data.sessions.windows import numbered_gaps, session_query
from onerec.data.source import LogSource, Rule, SplitRule
from onerec.errors import DataError

SESSION, ITEM = 5, 1  # the lengths of a session, and of the rule "next", which has none
LONGEST = 4 * SESSION  # positive rows of a visit
MOST_OF_MEDIAN = 2
ENOUGH_USERS = 10_000


def settle_rule(log: LogSource, config: SessionConfig, exposures: Exposures) -> tuple[Rule, str]:
    """What makes a session, and why.

    "auto" learns a log without feedback item by item: no reward model can tell its sessions apart,
    and lists of items keep the most rows as targets. With feedback it takes the first of the log's
    request ids, session ids and pauses whose sessions make targets of at least half as many
    positive rows as "next" would, which loses only each user's first rows. Pauses are told apart
    from sittings that no list could have shown (a hundred films rated in a row) and from single
    purchases: half of the positive rows must lie in runs of 2 to `LONGEST` positive rows.
    Everything else is learned item by item.
    A user counts with at most twice the median user's rows.

    Raises:
        ValueError: The config asks for what the log does not have.
    """
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
    if not {"watch_time_ms", *FLAGS} & set(columns):
        return "next", "the log has no feedback by which sessions could be aligned"
    against = []
    sizes = _sizes(exposures.positives)
    for rule in ("request", "session"):
        if f"{rule}_id" not in columns:
            continue
        share = _kept(log, config, rule, exposures, sizes)
        told = f"{share:.0%} of the positive rows become targets of its sessions"
        if share >= 0.5:
            return rule, f"the log has {rule} ids; {told}"
        against.append(f"the log has {rule} ids, but only {told}")
    if not against:
        against.append("the log has no request or session ids")
    if log.time != "ms":
        return "next", f"{against[-1]}; it has an order but no times"
    runs = numbered_gaps(exposures.positives, "user_row", config.gap_minutes)
    runs = runs.group_by(["user_row", "key"]).aggregate(n=runs.count())
    visits = runs.group_by("user_row").aggregate(n=runs.n.sum(where=runs.n.between(2, LONGEST)))
    share = _share(sizes, visits, sizes.n)
    visits_are = (
        f"visits (2 to {LONGEST} positive rows with pauses of at most {config.gap_minutes:g} "
        "minutes)"
    )
    if share < 0.5:
        told = f"only {share:.0%} of the positive rows lie in {visits_are}"
        return "next", f"{against[-1]}; {told}, so it is learned item by item"
    kept = _kept(log, config, "gap", exposures, sizes)
    told = f"{share:.0%} of the positive rows lie in {visits_are}"
    if kept < 0.5:
        return "next", f"{against[-1]}; {told}, but only {kept:.0%} would become targets"
    return "gap", f"{against[-1]}; {told}, and {kept:.0%} become targets"


def settle_length(config: SessionConfig, rule: Rule) -> SessionConfig:
    """The config with a length: null is 1 with the rule "next", else 5."""
    if config.length is not None:
        return config
    return replace(config, length=ITEM if rule == "next" else SESSION)


def _sizes(positives: Any) -> Any:
    """How many positive rows `n` a user has, and how many of them count: twice the median user's
    at most, so that one giant user decides neither the rule nor where the cuts lie."""
    sizes = positives.group_by("user_row").aggregate(n=ibis._.count())
    median = sizes.aggregate(median=sizes.n.quantile(0.5)).to_pyarrow()["median"][0].as_py()
    most = int(MOST_OF_MEDIAN * (median or 0))
    return sizes.mutate(counted=ibis.least(sizes.n, most))


def _share(sizes: Any, part: Any, whole: Any) -> float:
    """The share of `n` of `part` (a row a user) in `whole`, a user weighing what counts of it."""
    weight = sizes.counted / sizes.n
    totals = sizes.aggregate(n=(whole * weight).sum())
    both = part.inner_join(sizes.select("user_row", weight=weight), "user_row")
    found = both.aggregate(n=(both.n * both.weight).sum())
    values = [table.to_pyarrow()["n"][0].as_py() or 0.0 for table in (found, totals)]
    return float(values[0] / (values[1] or 1.0))


def _kept(
    log: LogSource, config: SessionConfig, rule: Rule, exposures: Exposures, sizes: Any
) -> float:
    """Positive rows that are targets under a rule, as a share of those under "next"."""
    query = session_query(log, settle_length(config, rule), rule, "time", (2**62, 2**62))
    made = query.candidates(exposures.table)
    made = made.filter(made.good & (made.start >= config.min_history))
    targets = made.group_by("user_row").aggregate(n=made.covers.sum())
    return _share(sizes, targets, ibis.greatest(sizes.n - config.min_history, 0))


def _counted(positives: Any) -> Any:
    """The positive exposures that count: of a user with more an even choice in time order."""
    rows = positives.mutate(
        at=ibis.row_number()
        .over(group_by=positives.user_row, order_by=[positives.timestamp, positives.row])
        .cast("int64")
    )
    rows = rows.inner_join(_sizes(positives), "user_row")
    chosen = (rows["at"] + 1) * rows.counted // rows.n > rows["at"] * rows.counted // rows.n
    return rows.filter(chosen)


def _giant(exposures: Exposures) -> str:
    """A part of the split's reason: who has more than a tenth of all positive rows."""
    sizes = _sizes(exposures.positives)
    rows = sizes.mutate(share=sizes.n / sizes.n.sum().over())
    rows = rows.filter(rows.share > 0.1).inner_join(exposures.users, "user_row")
    giants = rows.order_by(ibis.desc("n")).limit(1).to_pyarrow().to_pylist()
    if not giants or giants[0]["n"] == giants[0]["counted"]:
        return ""
    one = giants[0]
    return (
        f"; user {one['user_id']} has {one['n']:,} positive rows, of which {one['counted']:,} count"
    )


@dataclass(frozen=True)
class Split:
    """How sessions are split.

    Attributes:
        rule: "time", "last" or "column".
        reason: Why.
        cuts: With "time", when valid and test begin, in ms.
    """

    rule: SplitRule
    reason: str
    cuts: tuple[int, int] | None = None


def settle_split(log: LogSource, config: SessionConfig, rule: Rule, exposures: Exposures) -> Split:
    """How sessions are split, why, and where the cuts lie.

    "auto" takes the log's own split, else times. Only with the rule "next" it takes each user's
    last item for test and the one before for valid where cuts in time would leave in either
    fewer than a fifth of the users and fewer than 10,000 of them: a tenth of the rows of a
    log whose users come once (films rated in one sitting) belongs to a tenth of the users, mostly
    to new ones, while from 10,000 users on an interval of a recall is below one point.

    Raises:
        DataError: No exposure is positive.
        ValueError: The config asks for what the log does not have.
    """
    split, positives = config.split, exposures.positives
    if split == "column" and "split" not in log.interactions.columns:
        raise ValueError("split: wanted a log with a column split, got one without")
    if split == "time" and log.time == "position":
        raise ValueError("split: 'time' needs timestamps, which this log does not have")
    if split == "time":
        return Split("time", "asked for", _cuts(log, config, positives))
    if split != "auto":
        return Split(split, "asked for")
    if log.default_split != "time":
        return Split(log.default_split, "the log's own")
    cuts = _cuts(log, config, positives)
    if config.valid_from is not None:
        return Split("time", "valid_from and test_from were given", cuts)
    if log.default_cuts is not None:
        return Split("time", "the log's own", cuts)
    if rule != "next":
        return Split("time", f"sessions have times{_giant(exposures)}", cuts)
    rows = session_query(log, config, rule, "time", cuts).in_order(positives)
    held = rows.filter(rows["at"] >= config.min_history)
    users = held.aggregate(
        valid=held.user_row.nunique(where=held.period == 1),
        test=held.user_row.nunique(where=held.period == 2),
    )
    (found,) = users.to_pyarrow().to_pylist()
    sizes = _sizes(positives)
    of = int(sizes.filter(sizes.n >= 3).count().to_pyarrow().as_py())
    least = min(found.values())
    told = f"cuts in time hold out items of {least:,} of {of:,} users"
    if least and least >= min(of / 5, ENOUGH_USERS):
        return Split("time", told + _giant(exposures), cuts)
    return Split("last", f"{told} only")


def _cuts(log: LogSource, config: SessionConfig, positives: Any) -> tuple[int, int]:
    """When valid and test begin with the split "time", in ms.

    Raises:
        DataError: No exposure is positive.
        ValueError: The config's times are no times, or not in order.
    """
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
    time = _counted(positives).timestamp
    found = time.as_table().aggregate(
        valid=time.quantile(1 - config.valid_fraction - config.test_fraction),
        test=time.quantile(1 - config.test_fraction),
    )
    (cuts,) = found.to_pyarrow().to_pylist()
    if None in cuts.values():
        raise DataError(f"{log.path}: no exposure is positive, so no session can be built")
    return int(cuts["valid"]), int(cuts["test"])


def _milliseconds(name: str, value: str | int) -> int:
    if isinstance(value, int):
        return value
    try:
        time = datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"{name}: wanted an ISO time or milliseconds, got {value!r}") from error
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def check_order(log: LogSource, exposures: Any) -> None:
    """Refuses a split column that goes back in time: its histories would hold the future.

    Raises:
        DataError: With the first such row.
    """
    before = exposures.period.lag().over(
        group_by=exposures.user_row, order_by=[exposures.timestamp, exposures.row]
    )
    rows = exposures.mutate(before=before)
    at = rows.filter(rows.period < rows.before).row.min().to_pyarrow().as_py()
    if at is not None:
        raise log.table.bad(
            "wanted each user's rows in the order train, valid, test by time, got an earlier "
            "split after a later one",
            column="split",
            row=at,
        )
