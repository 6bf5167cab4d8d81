"""Rankers that count what follows and what is taken together; NumPy is all that they need.

A part gives every item of the catalogue evidence for a history: a list of weighted neighbors for
each item, and a weight for each place of the history. `CountRanker` adds parts, each divided by the
standard deviation of its evidence over the catalogue, and orders the items.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from onerec.errors import DataError
from onerec.files import atomic_write

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

FORMAT = 2
LAST = 50  # items of a history that any part reads

_PAIRS = 1 << 22  # pairs counted at once
_CELLS = 1 << 20  # user-item cells scored at once
_OFFSET_BITS = 4  # of the distance within a window


@dataclass(frozen=True)
class ItemLists:
    """Weighted neighbors of each item, best first; ties in a fixed scattered order of the indices.

    Args:
        offsets: int64 [N + 1], the neighbors of item i are at `offsets[i]:offsets[i + 1]`.
        items: int32 [n].
        weights: float32 [n], above 0.
    """

    offsets: IntArray
    items: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, item: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The neighbors of one item and their weights (views)."""
        inside = slice(self.offsets[item], self.offsets[item + 1])
        return self.items[inside], self.weights[inside]


@dataclass(frozen=True)
class CountPart:
    """One kind of evidence: `sum_a recency[a] * weight(a-th last item -> candidate)`.

    Args:
        lists: Neighbors of each item.
        recency: float64 [A], how much the last item of a history counts, the one before it, ...;
            earlier items are not read.
        constant: int64 [P] items and float64 [P] weights that every history gets as well.
    """

    lists: ItemLists
    recency: npt.NDArray[np.floating[Any]]
    constant: tuple[IntArray, FloatArray] | None = None


def transition(
    sequences: npt.ArrayLike,
    offsets: npt.ArrayLike,
    n_items: int,
    *,
    window: int = 5,
    last: int = 5,
    shrink: float = 10.0,
    neighbors: int = 200,
) -> CountPart:
    """A Markov chain: what follows an item within a window, nearer followers counting more.

    `weight(a -> b) = c(a, b) / (sum_x c(a, x) + shrink)`, where c adds 1/d for each b that stands
    d places after an a in one sequence, d <= window. The a-th last item of a history counts 1/a.

    Args:
        sequences: int [total], the users' items one after another, oldest first.
        offsets: int [users + 1], user u's items are `sequences[offsets[u]:offsets[u + 1]]`.
        n_items: Size of the catalogue N.
        window: Followers that count, 1 to 15.
        last: Items of a history that are read.
        shrink: Added to an item's total, so that rare items weigh less.
        neighbors: Most followers kept for an item.

    Raises:
        ValueError: An argument is out of range.
    """
    _positive(last=last, neighbors=neighbors)
    counted = _Sequences(sequences, offsets, n_items)

    def weigh(source: IntArray, target: IntArray, count: FloatArray) -> FloatArray:
        total = np.bincount(source - source[0], count)
        return cast(FloatArray, count / (total[source - source[0]] + shrink))

    lists = counted.neighbors(1.0 / np.arange(1, window + 1), False, neighbors, weigh)
    return CountPart(lists, 1.0 / np.arange(1, last + 1))


def co_consumption(
    sequences: npt.ArrayLike,
    offsets: npt.ArrayLike,
    n_items: int,
    *,
    window: int = 10,
    exponent: float = 0.5,
    last: int = LAST,
    decay: float = 0.8,
    neighbors: int = 200,
) -> CountPart:
    """What is taken near an item, in either direction.

    `weight(a, b) = c(a, b) / (n(a) n(b)) ** exponent`, where c counts the pairs of a and another
    item b at most `window` places apart and n counts occurrences: a cosine for the exponent 0.5;
    less of it favors popular items. The a-th last item of a history counts `decay ** (a - 1)`.

    Args:
        sequences: int [total], the users' items one after another, oldest first.
        offsets: int [users + 1].
        n_items: Size of the catalogue N.
        window: Places between two items, 1 to 15.
        exponent: Of the normalization, >= 0.
        last: Items of a history that are read.
        decay: In (0, 1].
        neighbors: Most neighbors kept for an item.

    Raises:
        ValueError: An argument is out of range.
    """
    _positive(last=last, neighbors=neighbors)
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay: wanted a value in (0, 1], got {decay}")
    counted = _Sequences(sequences, offsets, n_items)
    norm = np.maximum(np.bincount(counted.items, minlength=n_items), 1).astype(np.float64)
    norm **= exponent

    def weigh(source: IntArray, target: IntArray, count: FloatArray) -> FloatArray:
        return cast(
            FloatArray, np.where(source == target, 0.0, count / (norm[source] * norm[target]))
        )

    lists = counted.neighbors(np.ones(window), True, neighbors, weigh)
    return CountPart(lists, decay ** np.arange(last))


def personal_frequency(n_items: int, *, last: int = 200, decay: float = 0.95) -> CountPart:
    """What the user took before: each occurrence counts, the a-th last item `decay ** (a - 1)`.

    Args:
        n_items: Size of the catalogue N.
        last: Items of a history that are read.
        decay: In (0, 1].
    """
    _positive(last=last)
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay: wanted a value in (0, 1], got {decay}")
    itself = ItemLists(
        np.arange(n_items + 1, dtype=np.int64),
        np.arange(n_items, dtype=np.int32),
        np.ones(n_items, dtype=np.float32),
    )
    return CountPart(itself, decay ** np.arange(last))


def popularity(counts: npt.ArrayLike, *, neighbors: int = 200) -> CountPart:
    """The most frequent items, the same for every history.

    Args:
        counts: [N], occurrences in training, or their weights.
        neighbors: Items that have evidence.
    """
    seen = np.asarray(counts, dtype=np.float64)
    best = np.lexsort((_scattered(len(seen)), -seen))[:neighbors]
    best = best[seen[best] > 0].astype(np.int64)
    nothing = ItemLists(
        np.zeros(len(seen) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    )
    return CountPart(nothing, np.ones(1), (best, seen[best]))


class CountRanker:
    """Parts added up: each is divided by the standard deviation of its evidence over the catalogue.

    Items are ordered by score, then by popularity, then by a fixed scattered order of the indices
    (the index itself may tell when an item first occurred). Items without evidence have the score 0
    and come last.

    Args:
        parts: What is counted, at least one, over one catalogue.
        weights: One for each part, >= 0; 1 by default.
        counts: int [N], occurrences in training: the order of equal scores.

    Attributes:
        place: int64 [N], of each item in the order of popularity.

    Raises:
        ValueError: Lengths do not agree, or a weight is negative.
    """

    def __init__(
        self,
        parts: Sequence[CountPart],
        counts: npt.ArrayLike,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.parts = tuple(parts)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.parts)
        if not self.parts or len(self.weights) != len(self.parts):
            raise ValueError(
                f"weights: wanted one for each of {len(self.parts)} parts (at least one), "
                f"got {len(self.weights)}"
            )
        if min(self.weights) < 0:
            raise ValueError(f"weights: wanted values >= 0, got {self.weights}")
        for part in self.parts:
            if len(part.lists) != len(self.counts):
                raise ValueError(
                    f"parts: wanted lists of {len(self.counts)} items, got {len(part.lists)}"
                )
        self._by_count = np.lexsort((_scattered(len(self.counts)), -self.counts))
        self.place = np.empty_like(self._by_count)
        self.place[self._by_count] = np.arange(len(self.counts))

    @property
    def n_items(self) -> int:
        """Size of the catalogue N."""
        return len(self.counts)

    def with_weights(self, weights: Sequence[float]) -> CountRanker:
        """The same parts with other weights; parts of weight 0 are left out."""
        kept = [(p, w) for p, w in zip(self.parts, weights, strict=True) if w > 0]
        return CountRanker([p for p, _ in kept], self.counts, [w for _, w in kept])

    def score(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> tuple[IntArray, FloatArray]:
        """The k best items of each history.

        Args:
            histories: B sequences of item indices, oldest first.
            k: Length of the ranking.
            exclude: B sequences of item indices that must not appear.

        Returns:
            int64 [B, k] distinct items, best first, -1 where there are no more; float64 [B, k]
            scores: 0 for items without evidence, which follow by popularity, -inf beside -1.

        Raises:
            ValueError: An item is outside the catalogue, or k < 1.
        """
        items, scores = self.candidates(histories, k, exclude)
        for row in np.flatnonzero((items < 0).any(axis=1)).tolist():
            used = int((items[row] >= 0).sum())
            hidden = np.zeros(self.n_items, dtype=bool)
            hidden[self.place[items[row, :used]]] = True
            if exclude is not None:
                hidden[self.place[np.asarray(exclude[row], dtype=np.int64)]] = True
            more = self._by_count[np.flatnonzero(~hidden)[: k - used]]
            items[row, used : used + len(more)] = more
            scores[row, used : used + len(more)] = 0.0
        return items, scores

    def candidates(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> tuple[IntArray, FloatArray]:
        """As `score`, with only the items that have evidence; -1 and -inf behind them."""
        _positive(k=k)
        items = np.full((len(histories), k), -1, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf)
        for begin, bounds, columns, values in self.evidence(histories, exclude):
            total = np.asarray(self.weights) @ values
            for row, (low, high) in enumerate(itertools.pairwise(bounds), start=begin):
                best = best_places(total[low:high], k)
                items[row, : len(best)] = columns[low + best]
                scores[row, : len(best)] = total[low + best]
        return items, scores

    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        """The items of `score`: the interface of `onerec.evaluation.Ranker`."""
        return self.score(histories, k, exclude)[0]

    @property
    def groups(self) -> None:
        """Equal scores are ordered by a rule, so no two items are alike."""
        return None

    def grown(self, n_items: int) -> CountRanker:
        """The same counts over a catalogue with more items behind, of which nothing is known."""
        more = n_items - self.n_items
        if more < 0:
            raise ValueError(f"n_items: wanted at least {self.n_items}, got {n_items}")
        lists = {
            id(part.lists): ItemLists(
                np.append(part.lists.offsets, np.full(more, part.lists.offsets[-1])),
                part.lists.items,
                part.lists.weights,
            )
            for part in self.parts
        }
        parts = [CountPart(lists[id(p.lists)], p.recency, p.constant) for p in self.parts]
        counts = np.append(self.counts, np.zeros(more, self.counts.dtype))
        return CountRanker(parts, counts, self.weights)

    def evidence(
        self, histories: Sequence[npt.ArrayLike], exclude: Sequence[npt.ArrayLike] | None = None
    ) -> Iterator[tuple[int, IntArray, IntArray, FloatArray]]:
        """What each part knows, for a block of histories at a time.

        Yields:
            (begin, bounds int64 [b + 1], items int64 [n], values float64 [parts, n]): the block is
            the histories `begin .. begin + b - 1`, and history `begin + r` has evidence for
            `items[bounds[r]:bounds[r + 1]]`, in the order of popularity, without excluded ones.
            The values of each part are divided by their standard deviation over the catalogue.
        """
        n = self.n_items
        step = max(1, _CELLS // n)
        for begin in range(0, len(histories), step):
            block = histories[begin : begin + step]
            touched = np.zeros(len(block) * n, dtype=bool)
            found = []
            for part in self.parts:
                cells, weights = self._cells(part, block)
                touched[cells] = True
                found.append(np.bincount(cells, weights, minlength=len(touched)))
            rows, columns = np.nonzero(touched.reshape(len(block), n))
            at = rows * n + columns
            values = np.stack([dense[at] for dense in found]).astype(np.float64, copy=False)
            for value in values:
                mean = np.bincount(rows, value, minlength=len(block)) / n
                square = np.bincount(rows, value * value, minlength=len(block)) / n
                spread = np.sqrt(np.maximum(square - mean * mean, 0.0))
                value /= np.where(spread > 0, spread, 1.0)[rows]
            if exclude is not None:
                for row, hidden in enumerate(exclude[begin : begin + step]):
                    touched[row * n + self.place[self._checked(hidden)]] = False
                free = touched[at]
                rows, columns, values = rows[free], columns[free], values[:, free]
            bounds = np.searchsorted(rows, np.arange(len(block) + 1))
            yield begin, bounds, self._by_count[columns], values

    def _cells(
        self, part: CountPart, histories: Sequence[npt.ArrayLike]
    ) -> tuple[IntArray, FloatArray]:
        """The cells of [b, N] to which a part adds, and what it adds; columns are places."""
        n, depth = self.n_items, len(part.recency)
        tails = [self._checked(h)[-depth:][::-1] for h in histories]
        lengths = np.array([len(t) for t in tails], dtype=np.int64)
        items = np.concatenate([*tails, np.empty(0, np.int64)])
        row = np.repeat(np.arange(len(tails)), lengths)
        age = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first, size = part.lists.offsets[items], np.diff(part.lists.offsets)[items]
        at = np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())
        cells = np.repeat(row * n, size) + self.place[part.lists.items[at]]
        weights = np.repeat(part.recency[age], size) * part.lists.weights[at]
        if part.constant is not None:
            always = np.arange(len(tails))[:, None] * n + self.place[part.constant[0]]
            cells = np.concatenate([cells, always.reshape(-1)])
            weights = np.concatenate([weights, np.tile(part.constant[1], len(tails))])
        return cells, weights

    def _checked(self, items: npt.ArrayLike) -> IntArray:
        found = np.asarray(items, dtype=np.int64).reshape(-1)
        if len(found) and (found.min() < 0 or found.max() >= self.n_items):
            raise ValueError(
                f"items: wanted indices in 0..{self.n_items - 1}, got {found.min()}..{found.max()}"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes the ranker as one .npz file."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "format": np.array(FORMAT),
            "counts": self.counts,
            "weights": np.array(self.weights),
        }
        lists = {id(part.lists): number for number, part in reversed([*enumerate(self.parts)])}
        for number, part in enumerate(self.parts):
            fields: dict[str, npt.NDArray[Any]] = {"recency": part.recency}
            if lists[id(part.lists)] == number:
                fields |= {
                    "offsets": part.lists.offsets,
                    "items": part.lists.items,
                    "item_weights": part.lists.weights,
                }
            else:
                fields["lists_of"] = np.array(lists[id(part.lists)])
            if part.constant is not None:
                fields |= {"constant": part.constant[0], "constant_weights": part.constant[1]}
            arrays |= {f"{name}.{number}": value for name, value in fields.items()}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> CountRanker:
        """Reads what `save` wrote.

        Raises:
            DataError: The file is damaged or of another format.
        """
        try:
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                if int(file["format"]) != FORMAT:
                    raise ValueError(f"wanted format {FORMAT}, got {int(file['format'])}")
                parts: list[CountPart] = []
                for number in range(len(file["weights"])):
                    if f"lists_of.{number}" in file:
                        lists = parts[int(file[f"lists_of.{number}"])].lists
                    else:
                        names = ("offsets", "items", "item_weights")
                        lists = ItemLists(*(file[f"{name}.{number}"] for name in names))
                    constant = None
                    if f"constant.{number}" in file:
                        constant = (
                            file[f"constant.{number}"],
                            file[f"constant_weights.{number}"],
                        )
                    parts.append(CountPart(lists, file[f"recency.{number}"], constant))
                return cls(parts, file["counts"], file["weights"].tolist())
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, IndexError, EOFError, OSError, BadZipFile) as error:
            raise DataError(f"{path}: not a count ranker of this version: {error}") from error


class _Sequences:
    """The users' items, and where each item occurs."""

    def __init__(self, items: npt.ArrayLike, offsets: npt.ArrayLike, n_items: int) -> None:
        self.items = np.asarray(items, dtype=np.int64)
        bounds = np.asarray(offsets, dtype=np.int64)
        if len(self.items) and (self.items.min() < 0 or self.items.max() >= n_items):
            raise ValueError(
                f"sequences: wanted items in 0..{n_items - 1}, "
                f"got {self.items.min()}..{self.items.max()}"
            )
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self.items):
            raise ValueError(f"offsets: wanted 0 .. {len(self.items)}, got {bounds[[0, -1]]}")
        sizes = np.diff(bounds)
        self.n_items = n_items
        self.first = np.repeat(bounds[:-1], sizes)  # of the sequence of each place
        self.end = np.repeat(bounds[1:], sizes)
        self.places = np.argsort(self.items, kind="stable")
        self.starts = np.searchsorted(self.items[self.places], np.arange(n_items + 1))

    def neighbors(
        self,
        distance_weights: FloatArray,
        symmetric: bool,
        most: int,
        weigh: Callable[[IntArray, IntArray, FloatArray], FloatArray],
    ) -> ItemLists:
        """Pairs counted by distance, weighed, and the `most` best of each item kept.

        Memory is bounded by a block of items' pairs; the pairs of the one most frequent item are
        the least block.
        """
        window = len(distance_weights)
        if not 1 <= window < 1 << _OFFSET_BITS:
            raise ValueError(f"window: wanted 1..{(1 << _OFFSET_BITS) - 1}, got {window}")
        offsets = np.zeros(self.n_items + 1, dtype=np.int64)
        scattered = _scattered(self.n_items)
        items, weights = [], []
        room = max(1, _PAIRS // (window * (1 + symmetric)))
        begin = 0
        while begin < self.n_items:
            end = int(np.searchsorted(self.starts, self.starts[begin] + room, side="right")) - 1
            end = min(max(end, begin + 1), self.n_items)
            places = self.places[self.starts[begin] : self.starts[end]]
            source, target, count = self._counted(places, distance_weights, symmetric)
            if len(source):
                value = weigh(source, target, count)
                kept = value > 0
                source, target, value = source[kept], target[kept], value[kept]
                order = np.lexsort((scattered[target], -value, source))
                rank = np.arange(len(order)) - np.searchsorted(source, source)
                order = order[rank < most]
                offsets[begin + 1 : end + 1] = np.bincount(
                    source[order] - begin, minlength=end - begin
                )
                items.append(target[order].astype(np.int32))
                weights.append(value[order].astype(np.float32))
            begin = end
        return ItemLists(
            np.cumsum(offsets),
            np.concatenate([*items, np.empty(0, np.int32)]),
            np.concatenate([*weights, np.empty(0, np.float32)]),
        )

    def _counted(
        self, places: IntArray, distance_weights: FloatArray, symmetric: bool
    ) -> tuple[IntArray, IntArray, FloatArray]:
        """(source, target, sum of weights) of the pairs from these places, sorted."""
        keys = []
        base = self.items[places] * self.n_items
        for distance in range(1, len(distance_weights) + 1):
            for step in (distance, -distance) if symmetric else (distance,):
                other = places + step
                inside = np.flatnonzero((other < self.end[places]) & (other >= self.first[places]))
                pair = base[inside] + self.items[other[inside]]
                keys.append((pair << _OFFSET_BITS) | distance)
        key = np.sort(np.concatenate(keys))
        pair, apart = key >> _OFFSET_BITS, key & ((1 << _OFFSET_BITS) - 1)
        starts = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]][: len(pair)])
        if not len(starts):
            return pair, pair, np.empty(0)
        count = np.add.reduceat(distance_weights[apart - 1], starts)
        return pair[starts] // self.n_items, pair[starts] % self.n_items, count


def best_places(values: npt.NDArray[np.floating[Any]], k: int) -> IntArray:
    """Places of the k greatest values above 0, greatest first; equal ones in their order."""
    kept = np.flatnonzero(values > 0)
    if len(kept) > k:
        least = np.partition(values[kept], -k)[-k]
        kept = kept[values[kept] >= least]
    return kept[np.argsort(-values[kept], kind="stable")[:k]]


def _scattered(n: int) -> npt.NDArray[np.uint64]:
    """A different number for each index, far apart for indices side by side: uint64 [n]."""
    return np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: wanted >= 1, got {value}")
