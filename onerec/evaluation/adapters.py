"""A trained recommender and a simulated world, addressed by the session set's own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from onerec.evaluation import metrics as m
from onerec.evaluation.metrics import FloatArray, IntArray

_ORACLE_CELLS = 2_000_000  # user-item pairs valued at once


class SessionRecommender(Protocol):
    """What the harness calls on a trained recommender (`onerec.Recommender`).

    One whose `unconstrained` is true and that has `generate_unconstrained(histories) -> int [B, m,
    L]` gets its unconstrained legality measured.
    """

    @property
    def catalog(self) -> Any: ...

    def rank(
        self,
        histories: list[list[Any]],
        k: int,
        *,
        beam_width: int | None = None,
        exclude: list[list[Any]] | None = None,
        exclude_history: bool = True,
    ) -> list[list[Any]]: ...

    def recommend(
        self, histories: list[list[Any]], *, beam_width: int, exclude_history: bool = True
    ) -> list[Any]: ...


class TrueWatchTime(Protocol):
    """What the harness asks of a simulated world (`onerec.data.simulator.World`)."""

    @property
    def user_ids(self) -> npt.NDArray[Any]: ...

    @property
    def item_ids(self) -> npt.NDArray[Any]: ...

    def expected_watch_time(self, user_rows: IntArray, items: IntArray) -> FloatArray:
        """Seconds of one exposure, without session effects; shapes broadcast."""
        ...

    def session_value(self, user_row: IntArray, items: IntArray) -> Any:
        """Seconds of whole lists, items [S, m] with -1 for none, session effects included."""
        ...


class SessionJudge(Protocol):
    """What the harness asks of a reward model (`onerec.model.RewardModel`)."""

    @property
    def config(self) -> Any:
        """With `history_length`, the most items of a history."""
        ...

    def score(self, history: Any, sessions: Any) -> Any:
        """Rewards [B, 1] of sessions [B, 1, m] of item indices after histories [B, S]."""
        ...


def judged(judge: SessionJudge, histories: IntArray, sessions: IntArray) -> FloatArray:
    """Rewards float64 [B] of sessions [B, m] after histories [B, S], both padded with -1."""
    import torch

    with torch.inference_mode():
        found = judge.score(torch.from_numpy(histories), torch.from_numpy(sessions[:, None]))
    return np.asarray(found[:, 0].double().numpy())


class RecommenderRanker:
    """A recommender as a `Ranker` over item indices; items of one trie leaf are a group.

    Args:
        recommender: Takes and gives item ids.
        item_ids: [N], the id of each item index.
        beam_width: Beams of the next-item search.
        dense_weight: As for `onerec.Recommender.rank`.
    """

    def __init__(
        self,
        recommender: SessionRecommender,
        item_ids: Sequence[Any],
        *,
        beam_width: int,
        dense_weight: float | None = None,
    ) -> None:
        self.recommender = recommender
        self._options = {} if dense_weight is None else {"dense_weight": dense_weight}
        self._beam_width = beam_width
        self._ids = np.empty(len(item_ids), dtype=object)
        self._ids[:] = list(item_ids)
        self._index = {item_id: index for index, item_id in enumerate(item_ids)}
        catalog = recommender.catalog
        self.groups: IntArray = np.asarray(
            catalog.leaf_of_item[catalog.index_of(item_ids)], dtype=np.int64
        )

    @property
    def shared_ids(self) -> bool:
        """Whether any two items have one semantic id."""
        return len(np.unique(self.groups)) < len(self.groups)

    def ids(self, rows: Sequence[npt.ArrayLike]) -> list[list[Any]]:
        """Item indices as the log's item ids."""
        return [self._ids[np.asarray(row, dtype=np.int64)].tolist() for row in rows]

    def indices(self, rows: Sequence[Sequence[Any]], width: int) -> IntArray:
        """Item ids as item indices, int64 [B, width], padded with -1."""
        return m.pad_rows([[self._index[item] for item in row] for row in rows], width)

    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        ranked = self.recommender.rank(
            self.ids(histories),
            k,
            beam_width=self._beam_width,
            exclude=None if exclude is None else self.ids(exclude),
            exclude_history=exclude is not None,
            **self._options,
        )
        return self.indices(ranked, k)


class ScoreRanker:
    """A network that scores every item (SASRec, a dense head) as a `Ranker` over item indices.

    Args:
        score: Takes rows of histories int64 [B, S, columns], padded with -1 at the end, and gives
            scores [B, N].
        table: int64 [N, columns], the row of each item index.
        history_length: Latest items given to it.
        device: Where `score` wants its input.
        batch_size: Histories scored together.
    """

    groups: IntArray | None = None

    def __init__(
        self,
        score: Callable[[torch.Tensor], torch.Tensor],
        table: npt.ArrayLike,
        history_length: int,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 256,
    ) -> None:
        rows = np.asarray(table, dtype=np.int64)
        self._table = np.vstack([rows, np.full((1, rows.shape[1]), -1)])
        self._score, self._length = score, history_length
        self._device, self._batch_size = device, batch_size

    @torch.inference_mode()
    def rank(
        self,
        histories: Sequence[npt.ArrayLike],
        k: int,
        exclude: Sequence[npt.ArrayLike] | None = None,
    ) -> IntArray:
        ranked = []
        for begin in range(0, len(histories), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            seen = m.pad_rows([np.asarray(h)[-self._length :] for h in histories[part]])
            rows = torch.from_numpy(self._table[seen]).to(self._device)
            scores = self._score(rows).float()
            if exclude is not None:
                hidden = torch.from_numpy(m.pad_rows(exclude[part])).to(scores.device)
                # Padding hides a column more than there are items.
                scores = torch.nn.functional.pad(scores, (0, 1))
                column = torch.where(hidden >= 0, hidden, scores.shape[1] - 1)
                scores = scores.scatter(1, column, float("-inf"))[:, :-1]
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            items = best.indices.masked_fill(best.values == float("-inf"), -1)
            ranked.append(items.cpu().numpy())
        return m.pad_rows(list(np.concatenate(ranked)), k)


class WorldRows:
    """A world addressed by the session set's user rows and item indices."""

    def __init__(self, world: TrueWatchTime, user_ids: list[Any], item_ids: list[Any]) -> None:
        self._world = world
        self._users = _rows_of(world.user_ids, user_ids, "user")
        self._items = _rows_of(world.item_ids, item_ids, "item")

    def session_seconds(self, user_rows: IntArray, sessions: IntArray) -> FloatArray:
        """True expected seconds of each whole session, float64 [B]."""
        return np.asarray(self._world.session_value(self._users[user_rows], self._rows(sessions)))

    def item_seconds(self, user_rows: IntArray, sessions: IntArray) -> FloatArray:
        """Mean over a session's items of the expected seconds of each alone, float64 [B]."""
        shown = sessions >= 0
        seconds = self._world.expected_watch_time(
            self._users[user_rows][:, None], self._items[np.maximum(sessions, 0)]
        )
        total = np.where(shown, seconds, 0.0).sum(axis=1)
        return np.asarray(total / np.maximum(shown.sum(axis=1), 1))

    def oracle(self, user_rows: IntArray, length: int, exclude: IntArray) -> IntArray:
        """The items with the greatest true expected watch time, best first, int64 [B, length]."""
        n = len(self._items)
        best = []
        step = max(1, _ORACLE_CELLS // n)
        for begin in range(0, len(user_rows), step):
            users = self._users[user_rows[begin : begin + step]]
            value = np.array(self._world.expected_watch_time(users[:, None], self._items[None, :]))
            at, place = np.nonzero(exclude[begin : begin + step] >= 0)
            value[at, exclude[begin : begin + step][at, place]] = -math.inf
            top = np.argsort(-value, axis=1, kind="stable")[:, :length]
            best.append(np.where(np.take_along_axis(value, top, axis=1) == -math.inf, -1, top))
        return m.pad_rows(list(np.concatenate(best)), length)

    def _rows(self, sessions: IntArray) -> IntArray:
        return np.where(sessions >= 0, self._items[np.maximum(sessions, 0)], -1)


def _rows_of(known: npt.NDArray[Any], wanted: list[Any], what: str) -> IntArray:
    place = {value: row for row, value in enumerate(np.asarray(known).tolist())}
    try:
        return np.array([place[value] for value in wanted], dtype=np.int64)
    except KeyError as error:
        raise ValueError(f"world: the session set's {what} {error} is not in it") from None
