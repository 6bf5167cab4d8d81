"""Counting baselines of a session set: fitted on train, their few options chosen on valid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from onerec.data.session_set import Samples, SessionSet, list_values
from onerec.model.counting import (
    CountPart,
    CountRanker,
    FloatArray,
    IntArray,
    co_consumption,
    personal_frequency,
    popularity,
    transition,
)

SESSIONS = 4000  # of valid that choose the options
DEPTH = 10  # of the NDCG that chooses
_HOUR = 3_600_000  # milliseconds

EXPONENTS = (0.3, 0.5)
HISTORIES = ((10, 1.0), (50, 0.8))  # (last, decay) of co-consumption
TRANSITION_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
POPULARITY_WEIGHTS = (0.0, 0.1, 0.3)
RECENT = (0.003, 0.02, 0.1)  # of the log's span: the time in which an occurrence loses 63 %
RECENT_WEIGHTS = (0.1, 0.3, 1.0)
PERSONAL_WEIGHTS = (0.3, 1.0, 3.0)
PERSONAL_DECAYS = (0.9, 1.0)


def train_sequences(data: SessionSet) -> tuple[npt.NDArray[np.int32], IntArray]:
    """The items of each user that training may see.

    With a cut in time these are the items before it; otherwise the items before the user's first
    held-out session, or up to the end of the last train session of a user who has none.

    Returns:
        int32 [total] items, oldest first, and int64 [users + 1] offsets.
    """
    values, offsets = list_values(data.sequences["items"])
    inside = _of_training(data)
    kept = np.concatenate([[0], np.cumsum(inside)])[offsets]
    return values[inside], kept


def recent_counts(data: SessionSet, share: float) -> FloatArray | None:
    """Occurrences in training, recent ones more: `exp(-age / (share * span))` each.

    The age is that at the latest time of training, and the span the time between the first and the
    last.

    Returns:
        float64 [N]; None where the span is below an hour, as of places that stand for times.
    """
    items, _ = list_values(data.sequences["items"])
    times, _ = list_values(data.sequences["timestamps"])
    inside = _of_training(data)
    items, ages = items[inside], (times[inside].max(initial=0) - times[inside]).astype(np.float64)
    span = ages.max(initial=0.0)
    if span < _HOUR:
        return None
    weights: FloatArray = np.exp(-ages / (share * span))
    return cast(FloatArray, np.bincount(items, weights, minlength=data.n_items))


def _of_training(data: SessionSet) -> npt.NDArray[np.bool_]:
    """Whether training may see each item of the sequences."""
    values, offsets = list_values(data.sequences["items"])
    cut = data.funnel.get("split", {}).get("valid_from")
    if cut is not None:
        times, _ = list_values(data.sequences["timestamps"])
        return np.asarray(times < cut)
    end = offsets[:-1].copy()
    train = data.samples("train")
    sizes = np.diff(train.target_offsets)
    np.maximum.at(end, train.user_row, train.history_end + sizes)
    held = np.full(len(end), np.iinfo(np.int64).max)
    for split in ("valid", "test"):
        samples = data.samples(split)
        np.minimum.at(held, samples.user_row, samples.history_end)
    end = np.where(held < np.iinfo(np.int64).max, held, end)
    return np.arange(len(values)) < np.repeat(end, np.diff(offsets))


@dataclass(frozen=True)
class CountBaselines:
    """Counting rankers of one log and one treatment of the history.

    Attributes:
        rankers: "transition", "co-consumption" and "recent popularity" (their variants chosen on
            valid; the latter only where times span an hour), "personal frequency" (only where the
            history may be recommended) and "count ranker", their mixture.
        evidence: Every part that was tried, for `onerec.inference.Mixture` to weigh.
        chosen: The options of "co-consumption", "recent popularity" and "count ranker", with the
            NDCG@10 on the sessions of valid that chose them.
    """

    rankers: dict[str, CountRanker]
    evidence: CountRanker
    chosen: dict[str, dict[str, float]]


def fit_counts(
    data: SessionSet,
    histories: Sequence[str] = ("masked", "unmasked"),
    *,
    neighbors: int = 200,
    sessions: int = SESSIONS,
    seed: int = 0,
) -> dict[str, CountBaselines]:
    """Counts on train, and chooses on valid: the options with the best NDCG@10.

    Args:
        data: Sessions; without a valid session the first option of each grid is taken.
        histories: "masked" (the history cannot be recommended), "unmasked" (it can, and what the
            user took before is a part of the mixture), or both.
        neighbors: Most neighbors kept for an item.
        sessions: Most sessions of valid that choose, drawn with `seed`.
        seed: Of the draw.

    Returns:
        The rankers for each of `histories`.
    """
    items, offsets = train_sequences(data)
    n = data.n_items
    counts = data.items["train_count"].to_numpy()
    follow = transition(items, offsets, n, neighbors=neighbors)
    together = {}
    for exponent in EXPONENTS:
        part = co_consumption(items, offsets, n, exponent=exponent, neighbors=neighbors)
        for last, decay in HISTORIES:
            together[exponent, last, decay] = CountPart(part.lists, decay ** np.arange(last))
    weighed = {share: recent_counts(data, share) for share in RECENT}
    recent = {share: popularity(c) for share, c in weighed.items() if c is not None}
    parts = [*together.values(), follow, popularity(counts), *recent.values()]
    valid = data.samples("valid").sample(sessions, seed)
    found = {}
    for history in histories:
        masked = history == "masked"
        own = {} if masked else {d: personal_frequency(n, decay=d) for d in PERSONAL_DECAYS}
        weights, names = _grid(list(together), len(recent), list(own))
        everything = CountRanker([*parts, *own.values()], counts)
        gains = _gains(everything, valid, weights, masked)
        alone = np.flatnonzero((weights[:, len(together) :] == 0).all(axis=1))
        best = {
            "co-consumption": int(alone[np.argmax(gains[alone])]),
            "count ranker": int(np.argmax(gains)),
        }
        chosen = {name: names[row] | {"ndcg@10": float(gains[row])} for name, row in best.items()}
        mixed = {name: weights[row] for name, row in best.items()}
        if recent:
            at = len(together) + 2
            shares = np.eye(len(parts) + len(own))[at : at + len(recent)]
            more = [mixed["count ranker"] + w * s for s in shares for w in RECENT_WEIGHTS]
            gains = _gains(everything, valid, np.array([*shares, *more]), masked)
            first, second = int(np.argmax(gains[: len(shares)])), len(shares)
            mixed["recent popularity"] = shares[first]
            chosen["recent popularity"] = {
                "recent_share": [*recent][first],
                "ndcg@10": float(gains[first]),
            }
            row = int(np.argmax(gains[second:]))
            if gains[second + row] > chosen["count ranker"]["ndcg@10"]:
                mixed["count ranker"] = more[row]
                share, weight = divmod(row, len(RECENT_WEIGHTS))
                chosen["count ranker"] |= {
                    "recent": RECENT_WEIGHTS[weight],
                    "recent_share": [*recent][share],
                    "ndcg@10": float(gains[second + row]),
                }
        rankers = {"transition": CountRanker([follow], counts)}
        if not masked:
            rankers["personal frequency"] = CountRanker([own[PERSONAL_DECAYS[0]]], counts)
        rankers |= {name: everything.with_weights(row.tolist()) for name, row in mixed.items()}
        found[history] = CountBaselines(rankers, everything, chosen)
    return found


def _grid(
    together: list[tuple[float, int, float]], recent: int, own: list[float]
) -> tuple[FloatArray, list[dict[str, float]]]:
    """Weights [mixtures, parts] of every mixture without recent counts, and their options."""
    rows, names = [], []
    firsts = [*itertools.product(together, TRANSITION_WEIGHTS), (None, 1.0)]
    personal = [(None, 0.0), *itertools.product(own, PERSONAL_WEIGHTS)]
    for (variant, follow), popular, (decay, weight) in itertools.product(
        firsts, POPULARITY_WEIGHTS, personal
    ):
        row = [float(variant == other) for other in together] + [follow, popular] + [0.0] * recent
        rows.append(row + [weight if decay == other else 0.0 for other in own])
        name = {"transition": follow, "popularity": popular}
        if variant is not None:
            exponent, last, history_decay = variant
            name |= {"exponent": exponent, "last": last, "decay": history_decay}
        if decay is not None:
            name |= {"personal": weight, "personal_decay": decay}
        names.append(name)
    return np.array(rows), names


def _gains(ranker: CountRanker, samples: Samples, weights: FloatArray, masked: bool) -> FloatArray:
    """Mean NDCG@10 of each mixture, float64 [mixtures]."""
    gains = np.zeros(len(weights))
    if not len(samples):
        return gains
    histories = [samples.history(i) for i in range(len(samples))]
    targets = [np.unique(samples.target(i)) for i in range(len(samples))]
    ideal = np.cumsum(1.0 / np.log2(np.arange(DEPTH) + 2.0))
    for begin, bounds, items, values in ranker.evidence(histories, histories if masked else None):
        for row, (low, high) in enumerate(itertools.pairwise(bounds)):
            wanted = targets[begin + row]
            at = np.flatnonzero(np.isin(items[low:high], wanted))
            if not len(at):
                continue
            scores = weights @ values[:, low:high]
            mine = scores[:, at]
            places = (scores[:, None, :] > mine[:, :, None]).sum(axis=2)
            same = scores[:, None, :] == mine[:, :, None]
            places += (same & (np.arange(high - low) < at[:, None])).sum(axis=2)
            hit = (places < DEPTH) & (mine > 0)
            gain = np.where(hit, 1.0 / np.log2(places + 2.0), 0.0).sum(axis=1)
            gains += gain / ideal[min(len(wanted), DEPTH) - 1]
    return gains / len(samples)
