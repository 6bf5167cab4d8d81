"""Rankers that need no training, behind the one interface that the trained model also has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onerec.evaluation.metrics import IntArray, pad_rows


class Ranker(Protocol):
    """Ranks the catalogue for each history.

    Attributes:
        groups: int64 [N], items with equal numbers cannot be told apart by this ranker (equal
            scores, one shared semantic id); None when all can. The metrics then take the
            expectation over the orders of a group.
    """

    @property
    def groups(self) -> IntArray | None: ...

    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        """The k best items of each history.

        Args:
            histories: B sequences of item indices, oldest first.
            k: Length of the ranking.
            exclude: B sequences of item indices that must not appear.

        Returns:
            int64 [B, k] distinct item indices, best first; -1 where there are no more. Items of
            one group stand next to one another.
        """
        ...


class Popularity:
    """Ranks by the number of positive exposures in the train period.

    Items with equal counts are a group; their order in the list is a seeded shuffle.

    Args:
        counts: int [N].
        seed: Of the shuffle.
    """

    def __init__(self, counts: npt.ArrayLike, *, seed: int = 0) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1:
            raise ValueError(f"counts: wanted [N], got shape {self.counts.shape}")
        shuffled = np.random.default_rng(seed).permutation(len(self.counts))
        self._order = shuffled[np.argsort(-self.counts[shuffled], kind="stable")]
        self._place = np.empty_like(self._order)
        self._place[self._order] = np.arange(len(self._order))
        self.groups: IntArray = np.unique(-self.counts, return_inverse=True)[1].astype(np.int64)

    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        hidden = pad_rows(exclude if exclude is not None else [[]] * len(histories))
        width = min(len(self._order), k + hidden.shape[1])
        taken = np.zeros((len(histories), width + 1), dtype=bool)
        places = np.where(hidden >= 0, self._place[hidden], width)
        np.put_along_axis(taken, np.minimum(places, width), True, axis=1)
        taken = taken[:, :width]
        # A stable sort by "taken" keeps the order of the free places and puts them first.
        free = np.argsort(taken, axis=1, kind="stable")[:, :k]
        ranked = np.where(np.take_along_axis(taken, free, axis=1), -1, self._order[free])
        return pad_rows(list(ranked), k)


class Random:
    """A uniformly random order for each request: one group, so every metric is its expectation.

    Args:
        n_items: Size of the catalogue N.
        seed: Of the orders; each call of `rank` continues the stream.
    """

    def __init__(self, n_items: int, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.groups: IntArray = np.zeros(n_items, dtype=np.int64)

    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        n = len(self.groups)
        rows = []
        for row in range(len(histories)):
            hidden = np.unique(exclude[row]) if exclude is not None else np.empty(0, np.int64)
            drawn = self._rng.choice(n, size=min(n, k + len(hidden)), replace=False)
            rows.append(drawn[~np.isin(drawn, hidden)][:k])
        return pad_rows(rows, k)
