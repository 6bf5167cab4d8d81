"""A short-video world whose true expected watch time is known.

Users have interests, items have a topic, a creator, a quality and a length. An exposure is
skipped, watched in part, or watched to the end (and maybe again); each part's expectation has a
closed form, so the true value of any list of items is known. The three parts as functions of the
length were fitted so that the log of the default world has the marginals of KuaiRand-Pure's
single-column feed (70,003 exposures, 2022-04-25..30; Gao et al., CIKM 2022): mean watch time,
share watched to the end, under 3 s and under a tenth, in seven bands of length.
`World.marginals` gives ours beside theirs.

What a public log does not show, and so is an assumption here with a switch each: fatigue
(interest falls after similar items), repetition (a creator or an item again) and leaving.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.config import MOST_SHOWN, SimulatorConfig
from onerec.data.schema import bad
from onerec.data.world_texts import TOPICS, titles
from onerec.files import atomic_write

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Lengths of exposed videos (s) at these shares, tab 1 of KuaiRand-Pure; the ends are ours.
_LENGTH_SHARES = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 1.0)
_LENGTHS = (5.0, 10.5, 13.2, 27.9, 76.4, 161.6, 259.2, 308.7, 480.0)
# Polynomials in x = log(length / 76 s), fitted as the module's docstring says.
_SKIP_LOGIT = (0.48, -0.039, 0.180)
_FULL_LOGIT = (-3.07, -1.000, -0.032)
_SKIP_LOG_MEDIAN, _SKIP_SIGMA = 0.90, 0.66
_PART_TOP = 0.95
_PART_ALPHA = (-0.40, -0.160)
_PART_BETA = (0.045, 0.242, 0.262)
_AGAIN_LOGIT = (-0.9, -1.3)
_AGAIN_MEAN = (-1.08, -0.27)
# Feedback rates by share watched (KuaiRand-Pure, tab 1), interpolated between these points.
_RATIO_POINTS = (0.0, 0.01, 0.06, 0.2, 0.45, 0.75, 1.0, 1.5, 2.5)
_RATES = {
    "like": (0.005, 0.005, 0.009, 0.016, 0.023, 0.036, 0.038, 0.048, 0.086),
    "follow": (0.0005, 0.0005, 0.0012, 0.0012, 0.0018, 0.0015, 0.0036, 0.0024, 0.005),
    "comment": (0.0004, 0.0004, 0.0007, 0.0007, 0.0036, 0.0035, 0.0039, 0.0144, 0.031),
    "share": (0.0001, 0.0001, 0.0004, 0.0008, 0.0013, 0.002, 0.0013, 0.0029, 0.0062),
    "hate": (0.0007,) * 9,
}
_SKIP, _PART, _FULL = 0, 1, 2


_LOG_SCHEMA = pa.schema(
    {
        **{
            name: pa.int64()
            for name in (
                "user_id",
                "item_id",
                "timestamp",
                "request_id",
                "watch_time_ms",
                "duration_ms",
            )
        },
        **{name: pa.int8() for name in ("long_view", *_RATES)},
    }
)


@dataclass(frozen=True)
class _Outcome:
    """Of each slot: P(outcome) [S, m, 3], P(leave | outcome), expected seconds [S, m]."""

    probabilities: Floats
    leave: Floats
    seconds: Floats


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
    _item: dict[str, Floats] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._item = _item_terms(self.arrays)

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

    def _probabilities(self, score: Floats, items: npt.NDArray[Any]) -> Floats:
        """P(skip), P(part), P(full) [..., 3] at a score."""
        skip = np.exp(self._item["skip_logit"][items] - 0.5 * score)
        full = np.exp(self._item["full_logit"][items] + 0.5 * score)
        total = skip + 1.0 + full
        return np.stack([skip / total, 1.0 / total, full / total], axis=-1)

    def _seconds(self, probabilities: Floats, items: npt.NDArray[Any]) -> Floats:
        """Expected watch seconds: p_skip m_skip + p_part m_part + p_full m_full."""
        return np.asarray(np.sum(probabilities * self._item["means"][items], axis=-1))

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
        return self._seconds(self._probabilities(score, items), items)

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
                self._item["direction"][items[:, back:]],
                self._item["direction"][items[:, :-back]],
            )
            similarity[:, back:] += np.where(both, np.maximum(cosine, 0.0), 0.0) / 4.0
        if config.fatigue:
            score = score - config.fatigue_weight * similarity
        if config.repetition:
            creator = self.arrays["item_creator"][items]
            for kind, weight in ((creator, config.creator_weight), (items, config.item_weight)):
                same = (kind[:, :, None] == kind[:, None, :]) & shown[:, None, :]
                score = score - weight * np.tril(same, -1).any(axis=2)
        probabilities = self._probabilities(score, items)
        leave = np.zeros(probabilities.shape)
        if config.leaving:
            logit = config.leave_logit + self.arrays["user_patience"][users][:, None]
            if config.fatigue:
                logit = logit + 1.5 * similarity
            leave = 1.0 / (1.0 + np.exp(-(logit[..., None] + np.array([0.5, 0.0, -0.5]))))
        seconds = np.where(shown, self._seconds(probabilities, items), 0.0)
        # An empty slot shows nothing, so nobody leaves there.
        leave = np.where(shown[..., None], leave, 0.0)
        return _Outcome(probabilities, leave, seconds)

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
        stay = np.sum(outcome.probabilities * (1.0 - outcome.leave), axis=-1)
        reach = np.cumprod(np.concatenate([np.ones((len(items), 1)), stay[:, :-1]], axis=1), axis=1)
        value = np.sum(reach * outcome.seconds, axis=1)
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
        stay = np.sum(outcome.probabilities * (1.0 - outcome.leave), axis=-1)
        reach = np.cumprod(np.concatenate([np.ones((len(items), 1)), stay[:, :-1]], axis=1), axis=1)
        ratio = self._ratios()[np.maximum(items, 0)]
        keen = self.arrays["user_like"][users][:, None, None, None]
        found = {}
        for name, rates in _RATES.items():
            rate = np.interp(ratio, _RATIO_POINTS, rates) * (1.0 if name == "hate" else keen)
            mean = np.minimum(rate, 0.9).mean(axis=-1)
            each = np.where(items >= 0, (outcome.probabilities * mean).sum(axis=-1), 0.0)
            found[name] = np.sum(reach * each, axis=1)
        return found

    def _ratios(self, draws: int = 64) -> Floats:
        """Fixed draws of the share watched, given skip, part and full: [N, 3, draws]."""
        rng = np.random.default_rng([self.config.seed, 2])
        shape = (self.config.n_items, draws)
        length = self.arrays["item_seconds"][:, None]
        skip = np.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA * rng.standard_normal(shape))
        alpha, beta = self._item["alpha"][:, None], self._item["beta"][:, None]
        part = _PART_TOP * rng.beta(alpha, beta, shape)
        again = rng.random(shape) < self._item["again"][:, None]
        full = 1.0 + again * rng.exponential(self._item["again_mean"][:, None], shape)
        return np.stack([np.minimum(skip / length, 1.0), part, full], axis=1)

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
        config = self.config
        slots = (len(users), MOST_SHOWN + 8)
        source = rng.random(slots)
        items = rng.integers(0, config.n_items, slots)
        popular = source < 1.0 - config.explore
        items[popular] = self._popular(int(popular.sum()), rng)
        personal = source < 1.0 - config.explore - config.popular
        who = users[np.nonzero(personal)[0]]
        draws = self._popular(len(who) * config.candidates, rng).reshape(len(who), -1)
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
            items = np.take_along_axis(items, np.argsort(items < 0, axis=1, kind="stable"), axis=1)
            room = np.arange(items.shape[1]) < size[:, None]
            again = _repeated(users, np.where(room, items, -1))
            items = np.where(again, -1, items)
            if not again.any():
                break
        items = np.where(room, items, -1)
        items = np.take_along_axis(items, np.argsort(items < 0, axis=1, kind="stable"), axis=1)
        return items[:, :MOST_SHOWN]

    def _pick_coherent(
        self,
        items: Ints,
        personal: npt.NDArray[np.bool_],
        draws: Ints,
        guess: npt.NDArray[np.float32],
    ) -> None:
        """Fills the personal slots of items [S, m] one after another, each near the slots before.

        Args:
            items: The other slots are filled already.
            personal: bool [S, m]: slots to fill, [P] in all.
            draws: Candidates [P, c].
            guess: What the policy thinks of them [P, c].
        """
        directions = self._item["direction"].astype(np.float32)
        place = np.cumsum(personal).reshape(personal.shape) - 1
        before = np.zeros((len(items), directions.shape[1]), dtype=np.float32)
        for slot in range(items.shape[1]):
            rows = np.flatnonzero(personal[:, slot])
            at = place[rows, slot]
            near = np.einsum("scd,sd->sc", directions[draws[at]], before[rows]) / max(slot, 1)
            best = (guess[at] + np.float32(self.config.coherence) * near).argmax(axis=1)
            items[rows, slot] = draws[at, best]
            before += directions[items[:, slot]]

    def _guess(self, users: Ints, items: Ints) -> npt.NDArray[np.float32]:
        """Affinities of the items [S, c] of sorted user rows [S], in single precision."""
        mean, spread = self.arrays["affinity_scale"]
        user_vectors = (self.arrays["user_vectors"] / spread).astype(np.float32)
        item_vectors = self.arrays["item_vectors"].astype(np.float32)
        out = np.empty(items.shape, dtype=np.float32)
        block = max(1, (1 << 24) // len(item_vectors))
        distinct, row = np.unique(users, return_inverse=True)
        for begin in range(0, len(distinct), block):
            of_users = user_vectors[distinct[begin : begin + block]] @ item_vectors.T
            low, high = np.searchsorted(row, [begin, begin + block])
            out[low:high] = of_users[row[low:high, None] - begin, items[low:high]]
        return out - np.float32(mean / spread)

    def _popular(self, n: int, rng: np.random.Generator) -> Ints:
        table = self._item["popular"]
        return np.asarray(table[rng.integers(0, len(table), n)], dtype=np.int64)

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
        which = np.where(items >= 0, items, 0)
        length = self.arrays["item_seconds"][which]
        watch = np.minimum(
            np.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA * rng.standard_normal(items.shape)), length
        )
        part = kind == _PART
        watch[part] = (
            _PART_TOP
            * length[part]
            * rng.beta(self._item["alpha"][which[part]], self._item["beta"][which[part]])
        )
        full = kind == _FULL
        extra = rng.exponential(self._item["again_mean"][which[full]])
        extra *= rng.random(len(extra)) < self._item["again"][which[full]]
        watch[full] = length[full] * (1.0 + extra + rng.uniform(-0.03, 0.03, len(extra)))
        drawn = {"seen": seen, "watch": watch}
        ratio = watch / length
        keen = self.arrays["user_like"][users][:, None]
        for name, rates in _RATES.items():
            rate = np.interp(ratio, _RATIO_POINTS, rates) * (1.0 if name == "hate" else keen)
            drawn[name] = rng.random(items.shape) < np.minimum(rate, 0.9)
        return drawn

    def log(self, requests_per_chunk: int = 16384) -> Iterator[pa.Table]:
        """The interactions in the schema of docs/data.md, chunk by chunk of users.

        Equal worlds give equal logs whatever the memory; the chunk size is part of the seed.
        """
        per_user = self.arrays["user_requests"]
        ends = np.cumsum(per_user)
        begin, first_request = 0, 0
        while begin < len(per_user):
            limit = (ends[begin - 1] if begin else 0) + requests_per_chunk
            end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
            rng = np.random.default_rng([self.config.seed, 1, begin])
            users = np.repeat(np.arange(begin, end), per_user[begin:end])
            yield self._chunk(users, first_request, rng)
            first_request += len(users)
            begin = end

    def _chunk(self, users: Ints, first_request: int, rng: np.random.Generator) -> pa.Table:
        config = self.config
        items = self.shown(users, rng)
        drawn = self.draw(users, items, rng)
        seen, watch_ms = drawn["seen"], np.rint(drawn["watch"] * 1000).astype(np.int64)
        # Videos follow one another; a request begins a second after the one before has ended.
        spent = np.where(seen, watch_ms + 300, 0)
        offset = np.cumsum(spent, axis=1) - spent
        total = spent.sum(axis=1) + 1000
        span = config.days * 86_400_000
        wanted = rng.integers(0, span, len(users))
        wanted = wanted[np.lexsort((wanted, users))]  # users are in order already
        before = np.cumsum(total) - total
        apart = (users - users[0]) * np.int64(1 << 42)  # no user's times reach the next user's
        start = np.maximum.accumulate(wanted - before + apart) + before - apart
        stamp = config.start_ms + start[:, None] + offset
        request = np.broadcast_to((first_request + np.arange(len(users)))[:, None], items.shape)
        who = np.broadcast_to(users[:, None], items.shape)
        length_ms = np.rint(self.arrays["item_seconds"] * 1000).astype(np.int64)
        what = items[seen]
        long_view = watch_ms[seen] >= np.minimum(length_ms[what], 18_000)
        return pa.table(
            {
                "user_id": self.user_ids[who[seen]],
                "item_id": self.item_ids[what],
                "timestamp": stamp[seen],
                "request_id": request[seen],
                "watch_time_ms": watch_ms[seen],
                "duration_ms": length_ms[what],
                "long_view": long_view.astype(np.int8),
                **{name: drawn[name][seen].astype(np.int8) for name in _RATES},
            },
            schema=_LOG_SCHEMA,
        )

    def write(
        self, folder: str | Path, progress: Callable[[int, int, str], None] | None = None
    ) -> Path:
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
            pq.ParquetWriter(path, _LOG_SCHEMA, compression="zstd") as writer,
        ):
            for table in self.log():
                writer.write_table(table)
                if progress is not None:
                    progress(table["request_id"][-1].as_py() + 1, requests, "requests simulated")
        names = list(TOPICS)
        seconds = self.arrays["item_seconds"]
        items = pa.table(
            {
                "item_id": self.item_ids,
                "text": self.texts,
                "tags": [[names[k]] for k in self.arrays["item_topic"]],
                "duration_ms": np.rint(seconds * 1000).astype(np.int64),
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
        watch = log["watch_time_ms"].to_numpy() / 1000
        length = log["duration_ms"].to_numpy() / 1000
        ratio = watch / length
        user = log["user_id"].to_numpy()
        item = log["item_id"].to_numpy()
        low, middle, high, top = np.quantile(watch, [0.25, 0.5, 0.75, 0.9])
        r_low, r_middle, r_high, r_top = np.quantile(ratio, [0.25, 0.5, 0.75, 0.9])
        d_low, d_middle, d_high = np.quantile(length, [0.25, 0.5, 0.75])
        ours: dict[str, float] = {
            "watch seconds, mean": watch.mean(),
            "watch seconds, 25%": low,
            "watch seconds, 50%": middle,
            "watch seconds, 75%": high,
            "watch seconds, 90%": top,
            "length seconds, 25%": d_low,
            "length seconds, 50%": d_middle,
            "length seconds, 75%": d_high,
            "share watched, 25%": r_low,
            "share watched, 50%": r_middle,
            "share watched, 75%": r_high,
            "share watched, 90%": r_top,
            "watched to the end (>= 0.95)": (ratio >= 0.95).mean(),
            "watched twice (> 2)": (ratio > 2).mean(),
            "under 3 s": (watch < 3).mean(),
            "under 1 s": (watch < 1).mean(),
            "long view": log["long_view"].to_numpy().mean(),
        }
        ours |= {name: log[name].to_numpy().mean() for name in _RATES}
        for low_s, high_s in pairwise(_BUCKETS):
            inside = (length >= low_s) & (length < high_s)
            ours[f"watch seconds, length {low_s:g}-{high_s:g} s"] = watch[inside].mean()
        spread = np.log1p(watch)
        ours["variance of log(1 + s)"] = spread.var()
        ours["of it between users"] = _between(spread, user)
        ours["of it between items"] = _between(spread, item)
        topic = self.arrays["item_topic"][log["item_id"].to_numpy() - self.item_ids[0]]
        ours["same topic, within a request over apart"] = _cohesion(
            topic, log["request_id"].to_numpy(), user
        )
        return [(name, float(value), KUAIRAND[name]) for name, value in ours.items()]


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


def _repeated(group: Ints, items: Ints) -> npt.NDArray[np.bool_]:
    """Which slots [S, m] hold an item that an earlier slot of the same group has; -1 is empty."""
    key = (group[:, None] * (items.max() + 2) + items + 1).ravel()
    _, first = np.unique(key, return_index=True)
    again = np.ones(items.size, dtype=bool)
    again[first] = False
    return again.reshape(items.shape) & (items >= 0)


def _cohesion(kind: Ints, group: Ints, user: Ints) -> float:
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


def simulate(config: SimulatorConfig) -> World:
    """Draws users and items; the log is drawn by `World.write` or `World.log`."""
    rng = np.random.default_rng([config.seed, 0])
    d, seen = config.latent_dim, config.latent_dim - config.unseen_dim
    topics = rng.standard_normal((config.n_topics, d))
    topics[:, seen:] = 0.0  # a topic says nothing of the unseen part
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)

    creator_topic = rng.integers(0, config.n_topics, config.n_creators)
    creators = 0.35 * rng.standard_normal((config.n_creators, d)) / math.sqrt(d)
    weights = rng.gamma(1.0, 1.0, config.n_creators)
    creator = rng.choice(config.n_creators, config.n_items, p=weights / weights.sum())
    stray = rng.random(config.n_items) < 0.1
    topic = np.where(
        stray, rng.integers(0, config.n_topics, config.n_items), creator_topic[creator]
    )
    items = (
        topics[topic]
        + creators[creator]
        + 0.6 * rng.standard_normal((config.n_items, d)) / math.sqrt(d)
    )
    items[:, seen:] *= 2.0
    quality = rng.standard_normal(config.n_items)
    shares = rng.permutation((np.arange(config.n_items) + 0.5) / config.n_items)
    seconds = np.interp(shares, _LENGTH_SHARES, _LENGTHS).round(1)
    popularity = np.exp(
        0.35 * quality + config.popularity_spread * rng.standard_normal(config.n_items)
    )

    # A user likes a few topics much and most a little; the rest of the taste is personal.
    liking = rng.gamma(0.15, 1.0, (config.n_users, config.n_topics))
    liking /= np.linalg.norm(liking, axis=1, keepdims=True)
    users = liking @ topics + 0.5 * rng.standard_normal((config.n_users, d)) / math.sqrt(d)
    users[:, seen:] *= 2.0
    like = np.exp(2.27 * rng.standard_normal(config.n_users))
    requests = rng.poisson(rng.gamma(3.0, config.requests_per_user / 3.0, config.n_users))

    pairs = min(200_000, 50 * config.n_items)
    raw = np.einsum(
        "pd,pd->p",
        users[rng.integers(0, config.n_users, pairs)],
        items[rng.integers(0, config.n_items, pairs)],
    )

    visible = np.concatenate(
        [
            items[:, :seen],
            0.2 * rng.standard_normal((config.n_creators, config.unseen_dim))[creator],
        ],
        axis=1,
    )
    rotation = np.linalg.qr(rng.standard_normal((config.embedding_dim, d)))[0]
    embeddings = visible @ rotation.T
    embeddings += (
        config.embedding_noise
        * visible.std()
        * rng.standard_normal(embeddings.shape)
        * math.sqrt(d / config.embedding_dim)
    )
    return World(
        config,
        {
            "user_vectors": users,
            "user_activity": rng.standard_normal(config.n_users),
            "user_patience": 0.7 * rng.standard_normal(config.n_users),
            "user_like": like / like.mean(),
            "user_requests": np.maximum(requests, 1),
            "item_vectors": items,
            "item_quality": quality,
            "item_seconds": seconds,
            "item_topic": topic.astype(np.int64),
            "item_creator": creator.astype(np.int64),
            "popularity": popularity / popularity.sum(),
            "embeddings": embeddings.astype(np.float32),
            "affinity_scale": np.array([raw.mean(), raw.std()]),
        },
        titles(topic, seconds, rng),
    )


def _item_terms(world: dict[str, npt.NDArray[Any]]) -> dict[str, Floats]:
    """What each item's length says about the three parts, and lookup tables."""
    seconds, vectors = world["item_seconds"], world["item_vectors"]
    x = np.log(seconds / 76.0)

    def poly(coefficients: tuple[float, ...]) -> Floats:
        return np.asarray(sum(c * x**i for i, c in enumerate(coefficients)))

    alpha, beta = np.exp(poly(_PART_ALPHA)), np.exp(poly(_PART_BETA))
    again = 1.0 / (1.0 + np.exp(-poly(_AGAIN_LOGIT)))
    again_mean = np.exp(poly(_AGAIN_MEAN))
    # E[min(X, length)] of a lognormal X.
    z = (np.log(seconds) - _SKIP_LOG_MEDIAN) / _SKIP_SIGMA
    below = np.array([0.5 * math.erfc(-(v - _SKIP_SIGMA) / math.sqrt(2)) for v in z])
    above = np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in z])
    skip = math.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA**2 / 2) * below + seconds * above
    part = _PART_TOP * seconds * alpha / (alpha + beta)
    full = seconds * (1.0 + again * again_mean)
    slots = max(1 << 18, 64 * len(seconds))
    cumulative = np.cumsum(world["popularity"])
    popular = np.searchsorted(cumulative, (np.arange(slots) + 0.5) / slots * cumulative[-1])
    return {
        "skip_logit": poly(_SKIP_LOGIT),
        "full_logit": poly(_FULL_LOGIT),
        "alpha": alpha,
        "beta": beta,
        "again": again,
        "again_mean": again_mean,
        "means": np.stack([skip, part, full], axis=-1),
        "direction": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        "popular": popular,
    }
