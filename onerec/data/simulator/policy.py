"""The logging policy: what the world's users are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onerec.data.config import MOST_SHOWN, SimulatorConfig

Ints = npt.NDArray[np.int64]
_Singles = npt.NDArray[np.float32]


class LoggingPolicy:
    """Fills requests slot by slot: by popularity, by a noisy affinity, or evenly.

    Args:
        config: Of the world.
        arrays: Of the world.
        directions: Item vectors of length 1 [N, d].
    """

    def __init__(
        self,
        config: SimulatorConfig,
        arrays: dict[str, npt.NDArray[Any]],
        directions: npt.NDArray[np.float64],
    ) -> None:
        self._config, self._arrays = config, arrays
        self._directions = directions.astype(np.float32)
        # An item stands here as often as it is popular.
        slots = max(1 << 18, 64 * config.n_items)
        cumulative = np.cumsum(arrays["popularity"])
        self._by_popularity = np.searchsorted(
            cumulative, (np.arange(slots) + 0.5) / slots * cumulative[-1]
        )

    def shown(self, users: Ints, rng: np.random.Generator) -> Ints:
        """As `World.shown`."""
        config = self._config
        slots = (len(users), MOST_SHOWN + 8)
        source = rng.random(slots)
        items = rng.integers(0, config.n_items, slots)
        popular = source < 1.0 - config.explore
        items[popular] = self._popular(int(popular.sum()), rng)
        personal = source < 1.0 - config.explore - config.popular
        who = users[np.nonzero(personal)[0]]
        draws = self._popular((len(who), config.candidates), rng)
        even = rng.random(draws.shape) < 0.5
        draws[even] = rng.integers(0, config.n_items, int(even.sum()))
        guess = self._guess(who, draws)
        guess += np.float32(config.policy_noise) * rng.standard_normal(draws.shape, np.float32)
        if config.coherence:
            self._pick_coherent(items, personal, draws, guess)
        else:
            items[personal] = draws[np.arange(len(who)), guess.argmax(axis=1)]
        size = rng.integers(config.min_shown, config.max_shown + 1, len(users))
        items = np.where(_repeated(np.arange(len(users)), items), -1, items)
        for _ in range(4):  # what an earlier request had is replaced from the slots in reserve
            items = _empty_last(items)
            room = np.arange(items.shape[1]) < size[:, None]
            again = _repeated(users, np.where(room, items, -1))
            items = np.where(again, -1, items)
            if not again.any():
                break
        return _empty_last(np.where(room, items, -1))[:, :MOST_SHOWN]

    def _pick_coherent(
        self, items: Ints, personal: npt.NDArray[np.bool_], draws: Ints, guess: _Singles
    ) -> None:
        """Fills the personal slots of items [S, m] one after another, each near the slots before.

        Args:
            items: The other slots are filled already.
            personal: bool [S, m]: slots to fill, [P] in all.
            draws: Candidates [P, c].
            guess: What the policy thinks of them [P, c].
        """
        place = np.cumsum(personal).reshape(personal.shape) - 1
        before = np.zeros((len(items), self._directions.shape[1]), dtype=np.float32)
        for slot in range(items.shape[1]):
            rows = np.flatnonzero(personal[:, slot])
            at = place[rows, slot]
            near = np.einsum("scd,sd->sc", self._directions[draws[at]], before[rows])
            near /= max(slot, 1)
            best = (guess[at] + np.float32(self._config.coherence) * near).argmax(axis=1)
            items[rows, slot] = draws[at, best]
            before += self._directions[items[:, slot]]

    def _guess(self, users: Ints, items: Ints) -> _Singles:
        """Affinities of the items [S, c] of sorted user rows [S], in single precision."""
        mean, spread = self._arrays["affinity_scale"]
        user_vectors = (self._arrays["user_vectors"] / spread).astype(np.float32)
        item_vectors = self._arrays["item_vectors"].astype(np.float32)
        out = np.empty(items.shape, dtype=np.float32)
        block = max(1, (1 << 24) // len(item_vectors))
        distinct, row = np.unique(users, return_inverse=True)
        for begin in range(0, len(distinct), block):
            of_users = user_vectors[distinct[begin : begin + block]] @ item_vectors.T
            low, high = np.searchsorted(row, [begin, begin + block])
            out[low:high] = of_users[row[low:high, None] - begin, items[low:high]]
        return out - np.float32(mean / spread)

    def _popular(self, shape: int | tuple[int, int], rng: np.random.Generator) -> Ints:
        table = self._by_popularity
        return np.asarray(table[rng.integers(0, len(table), shape)], dtype=np.int64)


def _repeated(group: Ints, items: Ints) -> npt.NDArray[np.bool_]:
    """Which slots [S, m] hold an item that an earlier slot of the same group has; -1 is empty."""
    key = (group[:, None] * (items.max() + 2) + items + 1).ravel()
    _, first = np.unique(key, return_index=True)
    again = np.ones(items.size, dtype=bool)
    again[first] = False
    return again.reshape(items.shape) & (items >= 0)


def _empty_last(items: Ints) -> Ints:
    """The items [S, m] in their order, with the empty slots (-1) of each row moved to its end."""
    return np.take_along_axis(items, np.argsort(items < 0, axis=1, kind="stable"), axis=1)
