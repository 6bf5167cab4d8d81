"""A world's log: when requests come, and what users do in them, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onerec.data.config import SimulatorConfig
from onerec.data.simulator.exposure import FEEDBACK

Ints = npt.NDArray[np.int64]

_WHOLE = ("user_id", "item_id", "timestamp", "request_id", "watch_time_ms", "duration_ms")
LOG_SCHEMA = pa.schema(
    {
        **dict.fromkeys(_WHOLE, pa.int64()),
        **dict.fromkeys(("long_view", *FEEDBACK), pa.int8()),
    }
)


class Logged(Protocol):
    """What a log needs of a `World`."""

    @property
    def config(self) -> SimulatorConfig: ...
    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]: ...
    @property
    def user_ids(self) -> Ints: ...
    @property
    def item_ids(self) -> Ints: ...
    def shown(self, users: Ints, rng: np.random.Generator) -> Ints: ...
    def draw(
        self, users: Ints, items: Ints, rng: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]: ...


def log_tables(world: Logged, requests_per_chunk: int) -> Iterator[pa.Table]:
    """As `World.log`."""
    per_user = world.arrays["user_requests"]
    ends = np.cumsum(per_user)
    begin, first_request = 0, 0
    while begin < len(per_user):
        limit = (ends[begin - 1] if begin else 0) + requests_per_chunk
        end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
        rng = np.random.default_rng([world.config.seed, 1, begin])
        users = np.repeat(np.arange(begin, end), per_user[begin:end])
        yield _table(world, users, first_request, rng)
        first_request += len(users)
        begin = end


def _table(world: Logged, users: Ints, first_request: int, rng: np.random.Generator) -> pa.Table:
    items = world.shown(users, rng)
    drawn = world.draw(users, items, rng)
    seen, watch_ms = drawn["seen"], np.rint(drawn["watch"] * 1000).astype(np.int64)
    stamp = _stamps(world.config, users, np.where(seen, watch_ms + 300, 0), rng)
    request, what = np.nonzero(seen)[0], items[seen]
    length_ms = np.rint(world.arrays["item_seconds"] * 1000).astype(np.int64)[what]
    return pa.table(
        {
            "user_id": world.user_ids[users[request]],
            "item_id": world.item_ids[what],
            "timestamp": stamp[seen],
            "request_id": first_request + request,
            "watch_time_ms": watch_ms[seen],
            "duration_ms": length_ms,
            "long_view": (watch_ms[seen] >= np.minimum(length_ms, 18_000)).astype(np.int8),
            **{name: drawn[name][seen].astype(np.int8) for name in FEEDBACK},
        },
        schema=LOG_SCHEMA,
    )


def _stamps(config: SimulatorConfig, users: Ints, spent: Ints, rng: np.random.Generator) -> Ints:
    """When each slot [S, m] begins, in ms UTC; `spent` is its length in ms.

    Videos follow one another; a request begins a second after the one before has ended.
    """
    offset = np.cumsum(spent, axis=1) - spent
    total = spent.sum(axis=1) + 1000
    wanted = rng.integers(0, config.days * 86_400_000, len(users))
    wanted = wanted[np.lexsort((wanted, users))]  # users are in order already
    before = np.cumsum(total) - total
    apart = (users - users[0]) * np.int64(1 << 42)  # no user's times reach the next user's
    start = np.maximum.accumulate(wanted - before + apart) + before - apart
    return np.asarray(config.start_ms + start[:, None] + offset)
