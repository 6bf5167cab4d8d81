"""What a recommender finds for one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onerec.inference.rules import ItemId

_Ints = npt.NDArray[np.int64]


class Beams(NamedTuple):
    """Sessions that the engine found, best first; rows past `valid` hold -1 and -inf.

    Attributes:
        sids: int32 [B, M, m, L], semantic ids.
        items: int64 [B, M, m], their leaf ids.
        scores: float32 [B, M], sum of the scores of a session's codes.
        valid: int32 [B], live rows.
    """

    sids: npt.NDArray[np.int32]
    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    valid: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Recommendation:
    """Sessions for one request, best first; fewer than asked when the beam found fewer.

    Attributes:
        item_ids: For each session its items in order.
        scores: For each session the sum of the log-probabilities of its codes.
        sids: int32 [sessions, items, L], semantic ids.
    """

    item_ids: list[list[ItemId]]
    scores: list[float]
    sids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Candidates:
    """All sessions that a beam found for one request, best first, as arrays.

    Attributes:
        items: int64 [n, m], item indices of the catalogue.
        scores: float32 [n], sums of the log-probabilities of the codes.
    """

    items: _Ints
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class NextItems:
    """Items that the beam, the dense head or counts found for one request, and their scores.

    Attributes:
        items: int64 [c], indices of the catalogue, none excluded, ascending.
        beamed: bool [c], whether the beam found the item.
        generator: float32 [c], log-probability of the item's semantic id.
        dense: float32 [c], log-probability under the dense head's softmax over all items.
        counts: float32 [parts, c], evidence of each part of a `CountRanker`; no parts without one.
    """

    items: _Ints
    beamed: npt.NDArray[np.bool_]
    generator: npt.NDArray[np.float32]
    dense: npt.NDArray[np.float32]
    counts: npt.NDArray[np.float32]

    def best(self, k: int, dense_weight: float) -> _Ints:
        """The k best by (1 - dense_weight) * generator + dense_weight * dense, best first."""
        score = (1 - dense_weight) * self.generator + dense_weight * self.dense
        return self.items[np.argsort(-score, kind="stable")[:k]]

    def features(self) -> npt.NDArray[np.float64]:
        """float64 [2 + parts, c]: the rows that a `Mixture` weighs."""
        return np.concatenate([self.generator[None], self.dense[None], self.counts]).astype(float)
