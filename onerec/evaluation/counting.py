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


@dataclass(frozen=True)
class _Counted:
    """What is counted: the users' items and when they took them.

    Attributes:
        items: int32 [total], oldest first.
        offsets: int64 [users + 1].
        times: int64 [total], milliseconds.
    """

    items: npt.NDArray[np.int32]
    offsets: IntArray
    times: IntArray

    @classmethod
    def of(cls, data: SessionSet, *, whole: bool = False) -> _Counted:
        """All items of the users, or those that training may see: with a cut in time the items
        before it; otherwise those before the user's first held-out session, or up to the end of
        the last train session of a user who has none."""
        values, offsets = list_values(data.sequences["items"])
        times, _ = list_values(data.sequences["timestamps"])
        if whole:
            return cls(values, offsets, times)
        cut = data.funnel.get("split", {}).get("valid_from")
        if cut is not None:
            inside = np.asarray(times < cut)
        else:
            end = offsets[:-1].copy()
            train = data.samples("train")
            sizes = np.diff(train.target_offsets)
            np.maximum.at(end, train.user_row, train.history_end + sizes)
            held = np.full(len(end), np.iinfo(np.int64).max)
            for split in ("valid", "test"):
                samples = data.samples(split)
                np.minimum.at(held, samples.user_row, samples.history_end)
            end = np.where(held < np.iinfo(np.int64).max, held, end)
            inside = np.arange(len(values)) < np.repeat(end, np.diff(offsets))
        kept = np.concatenate([[0], np.cumsum(inside)])[offsets]
        return cls(values[inside], kept, times[inside])

    @property
    def span(self) -> float:
        """Milliseconds between the first time and the latest."""
        return float(np.ptp(self.times)) if len(self.times) else 0.0

    def recent(self, share: float, n_items: int) -> FloatArray:
        """Occurrences [N], each `exp(-age / (share * span))`."""
        ages = (self.times.max(initial=0) - self.times).astype(np.float64)
        weights: FloatArray = np.exp(-ages / max(share * self.span, 1.0))
        return cast(FloatArray, np.bincount(self.items, weights, minlength=n_items))


def train_sequences(data: SessionSet) -> tuple[npt.NDArray[np.int32], IntArray]:
    """The items of each user that training may see.

    Returns:
        int32 [total] items, oldest first, and int64 [users + 1] offsets.
    """
    counted = _Counted.of(data)
    return counted.items, counted.offsets


def count_evidence(data: SessionSet, *, whole: bool = False, neighbors: int = 200) -> CountRanker:
    """Every part that counting has, for `onerec.inference.Mixture` to weigh.

    Recent popularity is among the parts where the times of training span an hour; an age is that at
    the latest time that is counted, and the span that between the first and the latest.

    Args:
        data: Sessions.
        whole: Count the held-out sessions too, as recommendations for tomorrow should.
        neighbors: Most neighbors kept for an item.
    """
    counted, n = _Counted.of(data, whole=whole), data.n_items
    counts = np.bincount(counted.items, minlength=n)
    sequences = (counted.items, counted.offsets, n)
    parts = []
    for exponent in EXPONENTS:
        part = co_consumption(*sequences, exponent=exponent, neighbors=neighbors)
        parts += [CountPart(part.lists, decay ** np.arange(last)) for last, decay in HISTORIES]
    parts += [transition(*sequences, neighbors=neighbors), popularity(counts)]
    if _Counted.of(data).span >= _HOUR:
        parts += [popularity(counted.recent(share, n)) for share in RECENT]
    parts += [personal_frequency(n, decay=decay) for decay in PERSONAL_DECAYS]
    return CountRanker(parts, counts)


@dataclass(frozen=True)
class CountBaselines:
    """Counting rankers of one log and one treatment of the history.

    Attributes:
        rankers: "transition", "co-consumption" and "recent popularity" (their variants chosen on
            valid; the latter only where times span an hour), "personal frequency" (only where the
            history may be recommended) and "count ranker", their mixture.
        chosen: The options of "co-consumption", "recent popularity" and "count ranker", with the
            NDCG@10 on the sessions of valid that chose them.
    """

    rankers: dict[str, CountRanker]
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
    evidence = count_evidence(data, neighbors=neighbors)
    together = [(e, last, decay) for e in EXPONENTS for last, decay in HISTORIES]
    own = PERSONAL_DECAYS
    recent = RECENT[: len(evidence.parts) - len(together) - len(own) - 2]
    valid = data.samples("valid").sample(sessions, seed)
    found = {}
    for history in histories:
        masked = history == "masked"
        known = () if masked else own  # of what the user took before
        weights, names = _grid(together, len(recent), known)
        most = len(evidence.parts) - len(own) + len(known)
        everything = CountRanker(evidence.parts[:most], evidence.counts)
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
            shares = np.eye(weights.shape[1])[at : at + len(recent)]
            more = [mixed["count ranker"] + w * s for s in shares for w in RECENT_WEIGHTS]
            gains = _gains(everything, valid, np.array([*shares, *more]), masked)
            first, second = int(np.argmax(gains[: len(shares)])), len(shares)
            mixed["recent popularity"] = shares[first]
            chosen["recent popularity"] = {
                "recent_share": recent[first],
                "ndcg@10": float(gains[first]),
            }
            row = int(np.argmax(gains[second:]))
            if gains[second + row] > chosen["count ranker"]["ndcg@10"]:
                mixed["count ranker"] = more[row]
                share, weight = divmod(row, len(RECENT_WEIGHTS))
                chosen["count ranker"] |= {
                    "recent": RECENT_WEIGHTS[weight],
                    "recent_share": recent[share],
                    "ndcg@10": float(gains[second + row]),
                }
        mixed["transition"] = np.eye(weights.shape[1])[len(together)]
        if not masked:
            mixed["personal frequency"] = np.eye(weights.shape[1])[-len(own)]
        rankers = {name: everything.with_weights(row.tolist()) for name, row in mixed.items()}
        found[history] = CountBaselines(rankers, chosen)
    return found


def _grid(
    together: Sequence[tuple[float, int, float]], recent: int, own: Sequence[float]
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
