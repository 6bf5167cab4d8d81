"""Ranking and session metrics with expected credit for ties, and bootstrap intervals.

Rankings are int64 arrays [B, K] of item indices, best first, with -1 where the ranker had no more
items (a beam shorter than K): an empty place holds no item, so a target that is not listed is a
miss. Targets are int64 arrays [B, T] padded with -1; the targets of a row are distinct.

Items that a ranker cannot tell apart (equal scores, or one semantic id shared by several items)
form a *group*. The metrics then give the expectation over all orders of the group's items
(McSherry and Najork, "Computing information retrieval performance measures efficiently in the
presence of tied scores", ECIR 2008).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_CHUNK_CELLS = 4_000_000  # resampling counts held at once: 32 MB


def pad_rows(rows: Sequence[npt.ArrayLike], width: int | None = None) -> IntArray:
    """Ragged rows of item indices as int64 [B, width], padded with -1 on the right.

    Args:
        rows: One sequence of integers per row.
        width: Columns; the longest row by default, longer rows are cut.
    """
    arrays = [np.asarray(row, dtype=np.int64).reshape(-1) for row in rows]
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    columns = int(lengths.max(initial=0)) if width is None else width
    padded = np.full((len(arrays), columns), -1, dtype=np.int64)
    for row, array in zip(padded, arrays, strict=True):
        n = min(len(array), columns)
        row[:n] = array[:n]
    return padded


# Targets at the time of the item before them, and the others.
TIMES = ("same time", "later")


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Names of the buckets of train counts: "0", "1-5", "6-20", ">20" for edges (0, 5, 20)."""
    edges = (-1, *edges)
    names = [
        str(high) if high - low == 1 else f"{low + 1}-{high}"
        for low, high in itertools.pairwise(edges)
    ]
    return [*names, f">{edges[-1]}"]


@dataclass(frozen=True)
class TargetRanks:
    """Where each target stands in its row's ranking.

    A target's group takes the places `first .. first + size - 1` (from 0) in an unknown order.

    Attributes:
        first: int64 [B, T], the first place of the target's group; a value past every possible
            place when the group is not in the ranking.
        size: int64 [B, T], items of the group that could be recommended, at least 1.
        ordinal: int64 [B, T], how many earlier targets of the row are in the same listed group.
        valid: bool [B, T], false at padding.
    """

    first: IntArray
    size: IntArray
    ordinal: IntArray
    valid: BoolArray

    MISSED = np.iinfo(np.int64).max // 4


def target_ranks(
    ranked: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    exclude: npt.ArrayLike | None = None,
) -> TargetRanks:
    """Finds each target's group in the ranking.

    Args:
        ranked: int [B, K] item indices, best first, -1 for none; items of one group are adjacent.
        targets: int [B, T] item indices, -1 for none, distinct within a row.
        groups: int [N], the group (0, 1, ...) of each item; every item its own by default. The
            group may reach past place K: its targets then have a share of the places within.
        exclude: int [B, E] item indices that could not be recommended, -1 for none. They do not
            count in a group's size, and a target among them is a miss.

    Raises:
        ValueError: Shapes do not fit, or a row lists a group in two separate places.
    """
    listed, wanted = np.asarray(ranked, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    if listed.ndim != 2 or wanted.ndim != 2 or len(listed) != len(wanted):
        raise ValueError(
            f"ranked and targets: wanted [B, K] and [B, T], got {listed.shape} and {wanted.shape}"
        )
    valid = wanted >= 0
    if groups is None:
        listed_groups, wanted_groups = listed, wanted
        size = np.ones_like(wanted)
    else:
        of_item = np.asarray(groups, dtype=np.int64)
        listed_groups = np.where(listed >= 0, of_item[listed], -1)
        wanted_groups = np.where(valid, of_item[wanted], -1)
        _check_adjacent(listed_groups)
        size = np.bincount(of_item)[np.maximum(wanted_groups, 0)]

    match = (listed_groups[:, None, :] == wanted_groups[:, :, None]) & valid[:, :, None]
    found = match.any(axis=2)
    if exclude is not None:
        hidden = _distinct(np.asarray(exclude, dtype=np.int64))
        if len(hidden) != len(wanted):
            raise ValueError(f"exclude: wanted {len(wanted)} rows, got {len(hidden)}")
        found &= ~(hidden[:, None, :] == wanted[:, :, None]).any(axis=2)
        if groups is not None:
            hidden_groups = np.where(hidden >= 0, of_item[hidden], -1)
            same = (hidden_groups[:, None, :] == wanted_groups[:, :, None]).sum(axis=2)
            size = size - same
    first = np.full(wanted.shape, TargetRanks.MISSED, dtype=np.int64)
    if listed.shape[1]:
        first = np.where(found, match.argmax(axis=2), first)
    equal = wanted_groups[:, :, None] == wanted_groups[:, None, :]
    ordinal = np.tril(equal & found[:, :, None] & found[:, None, :], -1).sum(axis=2)
    return TargetRanks(first, np.maximum(size, 1), ordinal, valid)


def _check_adjacent(listed_groups: IntArray) -> None:
    """Raises ValueError when a group stands in two separate runs of one row."""
    starts = np.ones(listed_groups.shape, dtype=bool)
    starts[:, 1:] = listed_groups[:, 1:] != listed_groups[:, :-1]
    runs = np.where(starts & (listed_groups >= 0), listed_groups, -1)
    again = np.sort(runs, axis=1)
    bad = (again[:, 1:] == again[:, :-1]) & (again[:, 1:] >= 0)
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        raise ValueError(
            f"ranked: wanted the items of one group next to one another, got group "
            f"{int(again[row, 1:][bad[row]][0])} in two places of row {row}"
        )


def _distinct(rows: IntArray) -> IntArray:
    """The rows sorted, repeated values replaced by -1."""
    out = np.sort(rows, axis=1)
    again = np.zeros(out.shape, dtype=bool)
    again[:, 1:] = out[:, 1:] == out[:, :-1]
    out[again] = -1
    return out


def target_hits(ranks: TargetRanks, k: int) -> FloatArray:
    """P(target within the first k places), float64 [B, T]; 0 at padding.

    For a group on places f .. f+g-1: `min(max(k - f, 0), g) / g`.
    """
    inside = np.clip(k - ranks.first, 0, ranks.size)
    return np.where(ranks.valid, inside / ranks.size, 0.0)


def target_gains(ranks: TargetRanks, k: int) -> FloatArray:
    """E[discount of the target's place, cut at k], float64 [B, T]; 0 at padding.

    The discount of place r (from 0) is `1 / log2(r + 2)`; a group shares its places' mean.
    """
    total = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
    end = np.minimum(ranks.first + ranks.size, k)
    gain = (total[end] - total[np.minimum(ranks.first, k)]) / ranks.size
    return np.where(ranks.valid, gain, 0.0)


def recall(ranks: TargetRanks, k: int) -> FloatArray:
    """Recall@k of each row, float64 [B]: `sum_t P(t in the first k) / T`.

    With one target a row it equals the hit rate. NaN for a row without targets.
    """
    return _per_target(target_hits(ranks, k).sum(axis=1), ranks.valid.sum(axis=1))


def ndcg(ranks: TargetRanks, k: int) -> FloatArray:
    """NDCG@k of each row, float64 [B], binary relevance.

    `sum_t E[1 / log2(place_t + 2)] / sum_{r < min(T, k)} 1 / log2(r + 2)`; NaN without targets.
    """
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
    best = ideal[np.minimum(ranks.valid.sum(axis=1), k)]
    return _per_target(target_gains(ranks, k).sum(axis=1), best)


def hit_rate(ranks: TargetRanks, k: int) -> FloatArray:
    """P(at least one target within the first k), float64 [B]; NaN without targets.

    A group of g items with t targets and s places within k misses with the hypergeometric
    probability `prod_{i < t} (g - s - i) / (g - i)`; groups are independent.
    """
    inside = np.clip(k - ranks.first, 0, ranks.size)
    left = ranks.size - ranks.ordinal
    miss = np.clip((left - inside) / np.maximum(left, 1), 0.0, 1.0)
    miss = np.where(ranks.valid, miss, 1.0).prod(axis=1)
    return np.where(ranks.valid.any(axis=1), 1.0 - miss, np.nan)


def _per_target(total: FloatArray, count: npt.NDArray[Any]) -> FloatArray:
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


def session_hits(sessions: npt.ArrayLike, targets: npt.ArrayLike) -> FloatArray:
    """Session hit rate of each row, float64 [B]: 1 when a generated item is among the targets.

    Args:
        sessions: int [B, m] generated item indices, -1 for none.
        targets: int [B, T] item indices, -1 for none. NaN for a row without targets.
    """
    made, wanted = np.asarray(sessions), np.asarray(targets)
    match = (made[:, :, None] == wanted[:, None, :]) & (wanted >= 0)[:, None, :]
    return np.where((wanted >= 0).any(axis=1), match.any(axis=(1, 2)).astype(float), np.nan)


def session_recall(sessions: npt.ArrayLike, targets: npt.ArrayLike) -> FloatArray:
    """Share of the targets that the generated session holds, float64 [B]; NaN without targets."""
    made, wanted = np.asarray(sessions), np.asarray(targets)
    match = (made[:, :, None] == wanted[:, None, :]) & (wanted >= 0)[:, None, :]
    return _per_target(match.any(axis=1).sum(axis=1).astype(float), (wanted >= 0).sum(axis=1))


def session_duplicates(sessions: npt.ArrayLike) -> FloatArray:
    """Share of a session's items that repeat an earlier one, float64 [B]; NaN for an empty one."""
    made = np.asarray(sessions, dtype=np.int64)
    filled = (made >= 0).sum(axis=1)
    distinct = (_distinct(made) >= 0).sum(axis=1)
    return _per_target((filled - distinct).astype(float), filled)


def session_lengths(sessions: npt.ArrayLike) -> FloatArray:
    """Items in each session, float64 [B]."""
    lengths: FloatArray = (np.asarray(sessions) >= 0).sum(axis=1).astype(np.float64)
    return lengths


def exposure_counts(recommended: npt.ArrayLike, n_items: int) -> IntArray:
    """How often each item was recommended, int64 [n_items]; -1 entries are left out."""
    flat = np.asarray(recommended, dtype=np.int64).reshape(-1)
    return np.bincount(flat[flat >= 0], minlength=n_items)


def coverage(counts: npt.ArrayLike) -> float:
    """Share of the catalogue with any exposure; counts as of `exposure_counts`, [N]."""
    values = np.asarray(counts)
    return float((values > 0).mean()) if values.size else float("nan")


def gini(counts: npt.ArrayLike) -> float:
    """Gini coefficient of exposures [N]: 0 when all items get equal shares, to 1 - 1/N for one.

    `(2 sum_i i x_(i)) / (N sum_i x_i) - (N + 1) / N` with x ascending; NaN without exposures.
    """
    x = np.sort(np.asarray(counts, dtype=np.float64))
    n, total = len(x), x.sum()
    if total == 0:
        return float("nan")
    return float(2.0 * (np.arange(1, n + 1) * x).sum() / (n * total) - (n + 1) / n)


def entropy(counts: npt.ArrayLike) -> float:
    """Shannon entropy of exposures [N] in bits: `-sum_i p_i log2 p_i`; NaN without exposures."""
    x = np.asarray(counts, dtype=np.float64)
    total = x.sum()
    if total == 0:
        return float("nan")
    p = x[x > 0] / total
    return float(-(p * np.log2(p)).sum()) + 0.0


def popular_share(counts: npt.ArrayLike, popularity: npt.ArrayLike, *, top: float = 0.1) -> float:
    """Share of the exposures that go to the most popular items.

    Args:
        counts: int [N] exposures (`exposure_counts`).
        popularity: int [N], for instance positive exposures in training.
        top: The share of the catalogue that counts as popular. Items tied at the cut count with
            the fraction of them that is still within.

    Returns:
        A value in [0, 1]; NaN without exposures.
    """
    x, pop = np.asarray(counts, dtype=np.float64), np.asarray(popularity)
    if x.sum() == 0:
        return float("nan")
    places = top * len(pop)
    cut = np.sort(pop)[::-1][max(int(np.ceil(places)) - 1, 0)]
    above, tied = pop > cut, pop == cut
    weight = above + tied * np.clip((places - above.sum()) / tied.sum(), 0.0, 1.0)
    return float((x * weight).sum() / x.sum())


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile bootstrap interval.

    Attributes:
        value: The mean over all rows.
        low: Lower end.
        high: Upper end.
        n: The rows (or total weight) that counted.
    """

    value: float
    low: float
    high: float
    n: float


def bootstrap(
    values: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    clusters: npt.ArrayLike | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Percentile bootstrap of weighted means, one for each column.

    All columns share the same resamples, so a column holding the difference of two others is
    their paired bootstrap. With clusters (the rows of one user), whole clusters are drawn
    (Davison and Hinkley, "Bootstrap methods and their application", 1997, section 3.8).

    Args:
        values: float [n, C] or [n]; NaN where a row does not count in a column.
        weights: float, same shape, >= 0; 1 by default. The statistic is `sum w x / sum w`.
        clusters: int [n], rows with equal numbers are drawn together; each row alone by default.
        resamples: Number of bootstrap samples.
        confidence: Coverage of the interval.
        seed: Seed of the resampling.

    Returns:
        One interval a column; value, low and high are NaN for a column in which nothing counts.

    Raises:
        ValueError: No rows, or shapes or options out of range.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not len(x):
        raise ValueError(f"values: wanted [n, C] with n >= 1, got shape {x.shape}")
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"resamples and confidence: wanted at least 1 and a value in (0, 1), got {resamples} "
            f"and {confidence}"
        )
    w = np.ones_like(x)
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        w = w[:, None] if w.ndim == 1 else w
        if w.shape != x.shape:
            raise ValueError(f"weights: wanted the shape of values {x.shape}, got {w.shape}")
    w = np.where(np.isnan(x), 0.0, w)
    sums = np.where(np.isnan(x), 0.0, x) * w
    if clusters is not None:
        ids = np.asarray(clusters)
        if ids.shape != (len(x),):
            raise ValueError(f"clusters: wanted shape ({len(x)},), got {ids.shape}")
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]])
        sums, w = np.add.reduceat(sums[order], starts), np.add.reduceat(w[order], starts)

    n = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, x.shape[1]))
    step = max(1, _CHUNK_CELLS // n)
    both = np.concatenate([sums, w], axis=1)
    for begin in range(0, resamples, step):
        count = min(step, resamples - begin)
        drawn = rng.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        times = np.bincount(drawn.reshape(-1), minlength=count * n).reshape(count, n)
        totals = times.astype(np.float64) @ both
        means[begin : begin + count] = _ratio(totals[:, : x.shape[1]], totals[:, x.shape[1] :])
    value = _ratio(sums.sum(axis=0), w.sum(axis=0))
    tail = (1.0 - confidence) / 2.0
    result = []
    for c in range(x.shape[1]):
        column = means[:, c][~np.isnan(means[:, c])]
        low, high = np.quantile(column, [tail, 1.0 - tail]) if len(column) else (np.nan, np.nan)
        result.append(Interval(float(value[c]), float(low), float(high), float(w[:, c].sum())))
    return result


def paired_bootstrap(first: npt.ArrayLike, second: npt.ArrayLike, **options: Any) -> list[Interval]:
    """Bootstrap of the mean difference `first - second` over the same rows.

    Args:
        first: float [n, C] or [n].
        second: Same shape.
        options: As for `bootstrap`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"first and second: wanted one shape, got {a.shape} and {b.shape}")
    return bootstrap(a - b, **options)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    safe = np.where(denominator > 0, denominator, 1.0)
    return np.where(denominator > 0, numerator / safe, np.nan)
