"""A simulated log beside KuaiRand-Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onerec.data.simulator.exposure import FEEDBACK

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BUCKETS = (0.0, 12.0, 18.0, 30.0, 60.0, 120.0, 300.0, 1000.0)

# KuaiRand-Pure, tab 1 (single-column feed), 2022-04-25..30, 70,003 distinct rows.
KUAIRAND: dict[str, float] = {
    "watch seconds, mean": 25.28,
    "watch seconds, 25%": 2.11,
    "watch seconds, 50%": 6.52,
    "watch seconds, 75%": 26.75,
    "watch seconds, 90%": 72.16,
    "length seconds, 25%": 27.9,
    "length seconds, 50%": 76.4,
    "length seconds, 75%": 161.6,
    "share watched, 25%": 0.0293,
    "share watched, 50%": 0.1248,
    "share watched, 75%": 0.6595,
    "share watched, 90%": 1.0356,
    "watched to the end (>= 0.95)": 0.183,
    "watched twice (> 2)": 0.0117,
    "under 3 s": 0.337,
    "under 1 s": 0.0534,
    "long view": 0.355,
    "like": 0.0195,
    "follow": 0.0016,
    "comment": 0.0026,
    "share": 0.0009,
    "hate": 0.0007,
    "watch seconds, length 0-12 s": 7.32,
    "watch seconds, length 12-18 s": 8.97,
    "watch seconds, length 18-30 s": 12.35,
    "watch seconds, length 30-60 s": 18.20,
    "watch seconds, length 60-120 s": 29.83,
    "watch seconds, length 120-300 s": 36.12,
    "watch seconds, length 300-1000 s": 43.36,
    "variance of log(1 + s)": 1.794,
    "of it between users": 0.19,
    "of it between items": 0.09,
    # Tags of two exposures of a user at most 10 minutes apart, over more than a day apart.
    "same topic, within a request over apart": 1.35,
}


def marginals(log: pa.Table, topic: Ints) -> list[tuple[str, float, float]]:
    """(what, in this log, in KuaiRand-Pure).

    Args:
        log: Rows of `World.log`.
        topic: Of each row's item.
    """
    watch = log["watch_time_ms"].to_numpy() / 1000
    length = log["duration_ms"].to_numpy() / 1000
    ratio = watch / length
    user = log["user_id"].to_numpy()
    ours: dict[str, float] = {"watch seconds, mean": watch.mean()}
    for name, values, percents in (
        ("watch seconds", watch, (25, 50, 75, 90)),
        ("length seconds", length, (25, 50, 75)),
        ("share watched", ratio, (25, 50, 75, 90)),
    ):
        for percent in percents:
            ours[f"{name}, {percent}%"] = np.quantile(values, percent / 100)
    ours |= {
        "watched to the end (>= 0.95)": (ratio >= 0.95).mean(),
        "watched twice (> 2)": (ratio > 2).mean(),
        "under 3 s": (watch < 3).mean(),
        "under 1 s": (watch < 1).mean(),
        "long view": log["long_view"].to_numpy().mean(),
        **{name: log[name].to_numpy().mean() for name in FEEDBACK},
    }
    for low, high in pairwise(_BUCKETS):
        inside = (length >= low) & (length < high)
        ours[f"watch seconds, length {low:g}-{high:g} s"] = watch[inside].mean()
    spread = np.log1p(watch)
    ours["variance of log(1 + s)"] = spread.var()
    ours["of it between users"] = _between(spread, user)
    ours["of it between items"] = _between(spread, log["item_id"].to_numpy())
    ours["same topic, within a request over apart"] = cohesion(
        topic, log["request_id"].to_numpy(), user
    )
    return [(name, float(value), KUAIRAND[name]) for name, value in ours.items()]


def cohesion(kind: Ints, group: Ints, user: Ints) -> float:
    """How much likelier two rows of a group are of one kind than two rows of its user elsewhere.

    A user's rate elsewhere counts as often as the user has pairs within groups.
    """
    users, whose = np.unique(user, return_inverse=True)
    pairs: list[tuple[Floats, Floats]] = []
    for key in (group, user):
        _, first, row = np.unique(key, return_index=True, return_inverse=True)
        owner = whose[first]
        n = np.bincount(row).astype(np.float64)
        _, at, k = np.unique(row * (kind.max() + 1) + kind, return_index=True, return_counts=True)
        equal = np.bincount(owner[row[at]], k * (k - 1) / 2.0, len(users)).astype(np.float64)
        pairs.append((equal, np.bincount(owner, n * (n - 1) / 2, len(users)).astype(np.float64)))
    (same, inside), (all_same, all_pairs) = pairs
    known = (inside > 0) & (all_pairs > inside)
    apart = (all_same - same)[known] / (all_pairs - inside)[known]
    return float(same[known].sum() / np.sum(apart * inside[known]))


def _between(values: Floats, group: npt.NDArray[Any]) -> float:
    """Share of variance between groups, by the one-way random-effects moment estimator."""
    _, group = np.unique(group, return_inverse=True)
    n = np.bincount(group).astype(np.float64)
    means = np.bincount(group, weights=values) / n
    total, groups = n.sum(), len(n)
    within = np.sum((values - means[group]) ** 2) / (total - groups)
    between = np.sum(n * (means - values.mean()) ** 2) / (groups - 1)
    size = (total - np.sum(n**2) / total) / (groups - 1)
    variance = max((between - within) / size, 0.0)
    return float(variance / (variance + within))
