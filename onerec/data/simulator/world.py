"""The world: what users would do with what they are shown, exactly and by draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.config import SimulatorConfig
from onerec.data.schema import bad
from onerec.data.simulator.exposure import Watching, feedback_rates
from onerec.data.simulator.log import LOG_SCHEMA, log_tables
from onerec.data.simulator.marginals import marginals
from onerec.data.simulator.policy import LoggingPolicy
from onerec.data.simulator.texts import TOPICS
from onerec.files import atomic_write
from onerec.progress import Progress

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Outcome:
    """Of each slot, once the user is there: P(outcome) [S, m, 3] and P(leave | outcome)."""

    probabilities: Floats
    leave: Floats

    def reach(self) -> Floats:
        """P(the user gets to the slot), [S, m]."""
        stay = np.sum(self.probabilities * (1.0 - self.leave), axis=-1)
        first = np.ones((len(stay), 1))
        return np.cumprod(np.concatenate([first, stay[:, :-1]], axis=1), axis=1)


@dataclass
class World:
    """Users, items and the truth about them. Make one with `simulate`.

    Args:
        config: What it was made from.
        arrays: user_vectors [U, d], user_activity [U], user_patience [U], user_like [U],
            user_requests [U]; item_vectors [N, d], item_quality [N], item_seconds [N],
            item_topic [N], item_creator [N], popularity [N] (sums to 1); embeddings float32
            [N, embedding_dim]; affinity_scale [2] (mean and spread over random pairs).
        texts: One line an item.
    """

    config: SimulatorConfig
    arrays: dict[str, npt.NDArray[Any]]
    texts: list[str]
    _watching: Watching = field(init=False, repr=False)
    _directions: Floats = field(init=False, repr=False)
    _policy: LoggingPolicy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        vectors = self.arrays["item_vectors"]
        self._watching = Watching(self.arrays["item_seconds"])
        self._directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self._policy = LoggingPolicy(self.config, self.arrays, self._directions)

    @property
    def user_ids(self) -> Ints:
        """int64 [U]: the ids in the log; user row r is `user_ids[r]`."""
        return np.arange(1, self.config.n_users + 1, dtype=np.int64)

    @property
    def item_ids(self) -> Ints:
        """int64 [N]: the ids in the log; item index i is `item_ids[i]`."""
        return np.arange(100_000, 100_000 + self.config.n_items, dtype=np.int64)

    def affinity(self, user_rows: npt.ArrayLike, items: npt.ArrayLike) -> Floats:
        """How well items fit users, mean 0 and spread 1 over random pairs (shapes broadcast)."""
        mean, spread = self.arrays["affinity_scale"]
        users, items = np.asarray(user_rows), np.asarray(items)
        if (
            users.ndim == 2
            and items.ndim <= 2
            and users.shape[1] == 1
            and (items.ndim == 1 or items.shape[0] == 1)
        ):
            items = items.reshape(-1)
            raw = self.arrays["user_vectors"][users[:, 0]] @ self.arrays["item_vectors"][items].T
        else:
            raw = np.einsum(
                "...d,...d->...",
                self.arrays["user_vectors"][users],
                self.arrays["item_vectors"][items],
            )
        return np.asarray((raw - mean) / spread)

    def _score(self, users: npt.NDArray[Any], items: npt.NDArray[Any]) -> Floats:
        config = self.config
        return np.asarray(
            config.affinity_weight * self.affinity(users, items)
            + config.quality_weight * self.arrays["item_quality"][items]
            + config.activity_weight * self.arrays["user_activity"][users]
        )

    def expected_watch_time(self, user_rows: npt.ArrayLike, items: npt.ArrayLike) -> Floats:
        """Expected watch seconds of one exposure, exact, without session effects.

        Args:
            user_rows: Of any shape.
            items: Item indices, of a shape that broadcasts with it.

        Returns:
            float64 of the broadcast shape.
        """
        users, items = np.asarray(user_rows), np.asarray(items)
        score = self._score(users, items)
        items = np.broadcast_to(items, score.shape)
        return self._watching.seconds(self._watching.probabilities(score, items), items)

    def _outcome(self, users: Ints, items: Ints) -> _Outcome:
        """What happens at each slot, given that the user got there.

        Args:
            users: [S].
            items: [S, m]; -1 is an empty slot.
        """
        config = self.config
        shown = items >= 0
        items = np.where(shown, items, 0)
        score = self._score(users[:, None], items)
        similarity = np.zeros(items.shape)
        for back in range(1, min(4, items.shape[1] - 1) + 1):
            both = shown[:, back:] & shown[:, :-back]
            cosine = np.einsum(
                "smd,smd->sm",
                self._directions[items[:, back:]],
                self._directions[items[:, :-back]],
            )
            similarity[:, back:] += np.where(both, np.maximum(cosine, 0.0), 0.0) / 4.0
        if config.fatigue:
            score = score - config.fatigue_weight * similarity
        if config.repetition:
            creator = self.arrays["item_creator"][items]
            for kind, weight in ((creator, config.creator_weight), (items, config.item_weight)):
                same = (kind[:, :, None] == kind[:, None, :]) & shown[:, None, :]
                score = score - weight * np.tril(same, -1).any(axis=2)
        probabilities = self._watching.probabilities(score, items)
        leave = np.zeros(probabilities.shape)
        if config.leaving:
            logit = config.leave_logit + self.arrays["user_patience"][users][:, None]
            if config.fatigue:
                logit = logit + 1.5 * similarity
            leave = 1.0 / (1.0 + np.exp(-(logit[..., None] + np.array([0.5, 0.0, -0.5]))))
        # An empty slot shows nothing, so nobody leaves there.
        return _Outcome(probabilities, np.where(shown[..., None], leave, 0.0))

    def session_value(self, user_row: npt.ArrayLike, items: npt.ArrayLike) -> Any:
        """Expected total watch seconds of a shown list, session effects included. Exact.

        Fatigue and repetition depend on what was shown before, not on what the user did with
        it; leaving depends on the outcome of each item, and outcomes are independent given the
        list. So P(the user gets to slot t) is a product over earlier slots of
        sum_outcome p(outcome) (1 - leave(outcome)), and the value is
        sum_t P(t) E[seconds at t]. With the effects off it is the sum of
        `expected_watch_time`.

        Args:
            user_row: One user, or [S].
            items: Item indices [m] in the order shown, or [S, m]; -1 is an empty slot.

        Returns:
            A float for one session, else float64 [S].
        """
        items = np.asarray(items, dtype=np.int64)
        single = items.ndim == 1
        items = np.atleast_2d(items)
        users = np.broadcast_to(np.asarray(user_row, dtype=np.int64).reshape(-1), (len(items),))
        outcome = self._outcome(users, items)
        seconds = self._watching.seconds(outcome.probabilities, np.maximum(items, 0))
        value = np.sum(outcome.reach() * np.where(items >= 0, seconds, 0.0), axis=1)
        return float(value[0]) if single else value

    def session_feedback(self, user_rows: npt.ArrayLike, items: npt.ArrayLike) -> dict[str, Floats]:
        """Expected numbers of likes, follows, comments, shares and hates of shown lists.

        As `session_value`, with an item's seconds replaced by its rate of feedback: the mean over
        the shares watched of each outcome, by 64 fixed draws of skip, part and full, of the rate at
        that share times the user's readiness.

        Args:
            user_rows: [S].
            items: [S, m]; -1 is an empty slot.

        Returns:
            Name -> float64 [S].
        """
        items = np.asarray(items, dtype=np.int64)
        users = np.asarray(user_rows, dtype=np.int64)
        outcome = self._outcome(users, items)
        shares = self._watching.shares(64, np.random.default_rng([self.config.seed, 2]))
        shares, reach = shares[np.maximum(items, 0)], outcome.reach()
        readiness = self.arrays["user_like"][users][:, None, None, None]
        found = {}
        for name, rate in feedback_rates(shares, readiness):
            mean = (outcome.probabilities * rate.mean(axis=-1)).sum(axis=-1)
            each = np.where(items >= 0, mean, 0.0)
            found[name] = np.sum(reach * each, axis=1)
        return found

    def oracle(
        self, user_rows: npt.ArrayLike, k: int, exclude: list[npt.NDArray[Any]] | None = None
    ) -> Ints:
        """The k items with the most expected watch seconds for each user, best first.

        Args:
            user_rows: [S].
            k: How many.
            exclude: Item indices that a user must not get, one array a user.

        Returns:
            int64 [S, k]; ties go to the lower item index.
        """
        users = np.asarray(user_rows, dtype=np.int64)
        if not 1 <= k <= self.config.n_items:
            raise ValueError(f"k: wanted 1..{self.config.n_items}, got {k}")
        out = np.empty((len(users), k), dtype=np.int64)
        all_items = np.arange(self.config.n_items)
        for begin in range(0, len(users), 256):
            part = users[begin : begin + 256]
            value = self.expected_watch_time(part[:, None], all_items[None, :])
            if exclude is not None:
                for row, items in enumerate(exclude[begin : begin + 256]):
                    value[row, items] = -np.inf
            out[begin : begin + 256] = np.argsort(-value, axis=1, kind="stable")[:, :k]
        return out

    def oracle_session(
        self, user_row: int, length: int, exclude: npt.NDArray[Any] | None = None
    ) -> Ints:
        """A session built greedily by `session_value`: each slot takes the item that adds most.

        Exact for the best list where the session effects are off; with them on, a lower bound
        on the best value (the best list is a combinatorial problem).

        Returns:
            int64 [length].
        """
        taken: list[int] = []
        items = np.arange(self.config.n_items)
        blocked = np.zeros(self.config.n_items, dtype=bool)
        if exclude is not None:
            blocked[exclude] = True
        for _ in range(length):
            free = items[~blocked]
            lists = np.concatenate(
                [np.tile(np.array(taken, dtype=np.int64), (len(free), 1)), free[:, None]], axis=1
            )
            best = int(free[np.argmax(self.session_value(np.full(len(free), user_row), lists))])
            taken.append(best)
            blocked[best] = True
        return np.array(taken, dtype=np.int64)

    def shown(self, users: Ints, rng: np.random.Generator) -> Ints:
        """What the logging policy shows in successive requests: item indices, -1 padded.

        Not uniform: slot by slot by popularity, by a noisy affinity, or evenly. Nobody is shown
        an item twice: a draw that the user had before, in this or an earlier of the requests,
        is passed over, and a request may so fall short of its size.

        Args:
            users: User rows [S], not decreasing, one a request; a user's requests in the order
                of time.
            rng: Of the draws.

        Returns:
            int64 [S, 10].
        """
        return self._policy.shown(users, rng)

    def draw(
        self, users: Ints, items: Ints, rng: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """Draws what users do with shown sessions.

        Args:
            users: [S].
            items: [S, m]; -1 is an empty slot.
            rng: Of the draws.

        Returns:
            seen bool [S, m] (the user got there), watch seconds float64 [S, m], and a bool
            [S, m] for each of like, follow, comment, share, hate.
        """
        outcome = self._outcome(users, items)
        p = outcome.probabilities
        u = rng.random(items.shape)
        kind = (u >= p[..., 0]).astype(np.int8) + (u >= p[..., 0] + p[..., 1])
        leave = np.take_along_axis(outcome.leave, kind[..., None].astype(np.int64), axis=2)[..., 0]
        gone = np.cumsum(rng.random(items.shape) < leave, axis=1) > 0
        seen = items >= 0
        seen[:, 1:] &= ~gone[:, :-1]
        which = np.maximum(items, 0)
        watch = self._watching.draw(kind, which, rng)
        drawn = {"seen": seen, "watch": watch}
        share = watch / self.arrays["item_seconds"][which]
        for name, rate in feedback_rates(share, self.arrays["user_like"][users][:, None]):
            drawn[name] = rng.random(items.shape) < rate
        return drawn

    def log(self, requests_per_chunk: int = 16384) -> Iterator[pa.Table]:
        """The interactions in the schema of docs/data.md, chunk by chunk of users.

        Equal worlds give equal logs whatever the memory; the chunk size is part of the seed.
        """
        return log_tables(self, requests_per_chunk)

    def write(self, folder: str | Path, progress: Progress | None = None) -> Path:
        """Writes interactions.parquet, items.parquet, embeddings.npy and world.npz.

        Args:
            folder: Made when it is missing.
            progress: Called as progress(requests done, requests, what).

        Returns:
            The folder.
        """
        folder = Path(folder)
        requests = int(self.arrays["user_requests"].sum())
        with (
            atomic_write(folder / "interactions.parquet") as path,
            pq.ParquetWriter(path, LOG_SCHEMA, compression="zstd") as writer,
        ):
            for table in self.log():
                writer.write_table(table)
                if progress is not None:
                    progress(table["request_id"][-1].as_py() + 1, requests, "requests simulated")
        topics = list(TOPICS)
        items = pa.table(
            {
                "item_id": self.item_ids,
                "text": self.texts,
                "tags": [[topics[k]] for k in self.arrays["item_topic"]],
                "duration_ms": np.rint(self.arrays["item_seconds"] * 1000).astype(np.int64),
                "creator_id": self.arrays["item_creator"],
            }
        )
        with atomic_write(folder / "items.parquet") as path:
            pq.write_table(items, path, compression="zstd")
        with atomic_write(folder / "embeddings.npy") as path, path.open("wb") as file:
            np.save(file, self.arrays["embeddings"])
        stored: dict[str, Any] = {
            "config": np.array(json.dumps(asdict(self.config))),
            "texts": np.array(self.texts),
            **self.arrays,
        }
        with atomic_write(folder / "world.npz") as path, path.open("wb") as file:
            np.savez(file, **stored)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> World:
        """Reads world.npz.

        Raises:
            DataError: It is missing or damaged.
        """
        path = Path(folder) / "world.npz"
        if not path.is_file():
            raise bad(path, "there is no such file")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            config = SimulatorConfig(**json.loads(str(arrays.pop("config"))))
            texts = arrays.pop("texts").tolist()
            return cls(config, arrays, texts)
        except Exception as error:  # zip, zlib, JSON and key errors among them
            raise bad(path, f"not a whole world file: {error}") from error

    def marginals(self, rows: int = 200_000) -> list[tuple[str, float, float]]:
        """(what, here, KuaiRand-Pure) over about `rows` logged exposures."""
        tables, have = [], 0
        for table in self.log():
            tables.append(table)
            have += table.num_rows
            if have >= rows:
                break
        log = pa.concat_tables(tables)
        topic = self.arrays["item_topic"][log["item_id"].to_numpy() - self.item_ids[0]]
        return marginals(log, topic)
