"""Phase 4, which sessions stay, and what their targets are."""

from __future__ import annotations

from typing import Any

import ibis

from onerec.data.config import SessionConfig
from onerec.data.session_set import SPLITS
from onerec.data.sessions.windows import TRAIN, split_name

# From this share of repeats on, what a user has taken may be recommended again.
MOST_REPEATS = 0.05
OF_A_USER = 50  # targets of a user that weigh in that share


def step(name: str, unit: str, count: int) -> dict[str, Any]:
    """A step of the funnel."""
    return {"step": name, "unit": unit, "count": count}


def keep(
    candidates: Any, config: SessionConfig, rule: str
) -> tuple[Any, list[dict[str, Any]], dict[str, int]]:
    """The sessions that stay in the order of sessions.parquet, what was dropped why, and counts."""
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
        "request": "windows of requests",
        "session": "windows of sessions by id",
        "gap": "windows of runs without a long pause",
        "next": "windows of the next good exposures",
    }[rule]
    steps = [step(what, "sessions", counted["all"])]
    if rule != "next":
        steps += [
            step("sessions inside one split", "sessions", counted["inside"]),
            step("high-quality sessions", "sessions", counted["good"]),
            step("sessions with a positive item", "sessions", counted["filled"]),
        ]
    history = f"sessions with a history of {config.min_history} or more"
    steps.append(step(history, "sessions", counted["kept"]))
    rows = c.filter(kept).order_by(["period", "user_row", "timestamp", "start", "key", "chunk"])
    rows = rows.mutate(split=split_name(rows.period))
    return rows, steps, {name: counted[name] for name in SPLITS}


def count_targets(kept: Any, positives: int) -> dict[str, Any]:
    """How many positive rows are a target of a session, and of one of train."""
    found = kept.aggregate(
        targets=kept.covers.sum(), train=kept.covers.sum(where=kept.period == TRAIN)
    )
    (counts,) = found.to_pyarrow().to_pylist()
    targets, train = (int(counts[name] or 0) for name in ("targets", "train"))
    return {
        "positive rows": positives,
        "that are a target": targets,
        "that are a training target": train,
        "share": round(targets / positives, 4),
    }


def count_repeats(kept: Any, positives: Any) -> dict[str, Any]:
    """How many targets of train the user has taken before, and what follows from it.

    `exclude_history` is whether such items are left out of recommendations and rankings unless
    somebody says otherwise. Leaving them out loses every repeat; leaving them in gives places of
    the list to items that the user is done with, and costs about a sixth of the hits where nobody
    repeats (Amazon Beauty, Recall@10 .105 masked against .090). A repeat is named some three times
    as easily as a new item, since the history names it, so both are worth the same at about
    1/6 / 3 = 5 % of repeats. A user weighs as `OF_A_USER` targets at most, so that one giant user
    does not decide for everybody.
    """
    order = [positives.timestamp, positives.row]
    rows = positives.select(
        "user_row",
        "item_index",
        at=ibis.row_number().over(group_by=positives.user_row, order_by=order),
    )
    first = rows.group_by(["user_row", "item_index"]).aggregate(first=rows["at"].min())
    train = kept.filter(kept.period == TRAIN)
    targets = train.select("user_row", "start", item_index=train.target.unnest())
    both = targets.left_join(first, ["user_row", "item_index"])
    repeated = (both["first"] < both.start).fill_null(False).cast("int64")
    users = both.group_by("user_row").aggregate(targets=both.count(), repeats=repeated.sum())
    weight = ibis.least(users.targets, OF_A_USER)
    found = users.aggregate(
        targets=users.targets.sum(),
        repeats=users.repeats.sum(),
        weight=weight.sum(),
        weighed=(weight * users.repeats / users.targets).sum(),
    )
    (counts,) = found.to_pyarrow().to_pylist()
    share = float(counts["weighed"]) / int(counts["weight"])
    return {
        "training targets": int(counts["targets"]),
        "that the history has": int(counts["repeats"]),
        "share": round(share, 4),
        "exclude_history": share < MOST_REPEATS,
    }
