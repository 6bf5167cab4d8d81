"""What the config leaves to the log: the rule, the split and its cuts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from onerec.data.config import SessionConfig
from onerec.data.schema import bad
from onerec.data.sessions.query import numbered_gaps
from onerec.data.source import LogSource, Rule, SplitRule
from onerec.errors import DataError


def settle_rule(log: LogSource, config: SessionConfig) -> tuple[Rule, str]:
    """What makes a session, and why.

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
    if "request_id" in columns:
        return "request", "the log has request ids"
    if "session_id" in columns:
        return "session", "the log has session ids"
    rows = numbered_gaps(log.interactions, "user_id", config.gap_minutes)
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


def settle_split(log: LogSource, config: SessionConfig) -> SplitRule:
    """How sessions are split.

    Raises:
        ValueError: The config asks for what the log does not have.
    """
    split = log.default_split if config.split == "auto" else config.split
    if split == "column" and "split" not in log.interactions.columns:
        raise ValueError("split: wanted a log with a column split, got one without")
    if split == "time" and log.time == "position":
        raise ValueError("split: 'time' needs timestamps, which this log does not have")
    return split


def settle_cuts(log: LogSource, config: SessionConfig, positives: Any) -> tuple[int, int]:
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
    found = positives.aggregate(
        valid=positives.timestamp.quantile(1 - config.valid_fraction - config.test_fraction),
        test=positives.timestamp.quantile(1 - config.test_fraction),
    ).to_pyarrow()
    values = [found[name][0].as_py() for name in ("valid", "test")]
    if None in values:
        raise DataError(f"{log.path}: no exposure is positive, so no session can be built")
    return int(values[0]), int(values[1])


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
        raise bad(
            log.interactions_path,
            "wanted each user's rows in the order train, valid, test by time, got an earlier "
            "split after a later one",
            column="split",
            row=at,
        )
