"""Which request is next: prices, fair shares, budgets, and what the engine is expected to take."""

from __future__ import annotations

import asyncio
import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from onerec.serving.answer import Answer


class QueueFull(Exception):
    """As much waits as may; `retry_after` is a guess in seconds when one more request fits."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Options:
    """What must be equal in requests that are decoded together.

    With `k` a request is for a ranking of next items, otherwise for sessions.
    """

    session_length: int | None
    beam_width: int
    num_sessions: int
    exclude_history: bool
    allow_tags: frozenset[str | int] | None
    scoring: str | None
    temperature: float
    k: int | None = None
    dense_weight: float | None = None
    arm: str = "a"


@dataclass(eq=False)
class Job:
    """A request that waits.

    Attributes:
        history: Item ids, oldest first.
        exclude: Item ids never to show.
        options: The rest.
        client: Whose it is; clients have equal shares of the engine.
        price: Beams times steps of the search.
        arrived: On the clock of `time.monotonic`.
        deadline: When its answer must be there, on that clock.
        reply: The answer; cancelled when nobody waits for it any more.
    """

    history: list[Any]
    exclude: list[Any]
    options: Options
    client: str
    price: int
    arrived: float
    deadline: float
    reply: asyncio.Future[Answer]
    start: float = field(default=0.0, init=False)

    @property
    def rows(self) -> int:
        """Beams."""
        return self.options.beam_width


class Pace:
    """What the engine takes for work of a price, learned from its calls."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by the bits of the price, smoothed

    def note(self, price: int, seconds: float) -> None:
        """Takes a call into account."""
        bits = price.bit_length()
        known = self._seconds.get(bits, seconds)
        self._seconds[bits] = known + 0.2 * (seconds - known)

    def expected(self, price: int) -> float:
        """Seconds; 0 as long as nothing is known."""
        bits = price.bit_length()
        if not self._seconds:
            return 0.0
        near = min(self._seconds, key=lambda known: (abs(known - bits), known))
        return self._seconds[near] * 2.0 ** (bits - near)

    def doubt(self, price: int) -> None:
        """Lowers an estimate by which work was refused, so that a wrong one ends by itself."""
        self._seconds[price.bit_length()] = 0.9 * self.expected(price)


class FairQueue:
    """Waiting requests, ordered so that clients, and dear and cheap requests, have equal shares.

    Start-time fair queueing (Goyal, Vin, Cheng 1996): a flow is the requests of a client with a
    price of one order of magnitude. A request starts, on a clock of work done, where the one before
    it in its flow ends, and the one that starts first is next. So a small request waits for the
    call under way and no more, whatever else waits. Not thread-safe.

    Args:
        max_requests: Most requests.
        max_rows: Most beams of all of them; a lone request may have more.
    """

    def __init__(self, max_requests: int, max_rows: int) -> None:
        self._max_requests, self._max_rows = max_requests, max_rows
        self._jobs: list[Job] = []  # by start, then by arrival
        self._ends: dict[tuple[str, int], float] = {}
        self._clock = 0.0
        self.rows = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Any:
        return iter(self._jobs)

    def push(self, job: Job) -> list[Job]:
        """Adds a request. Where the queue is full, a client that holds more than this one pays.

        Returns:
            Requests that had to go for it, the last ones of such clients.

        Raises:
            QueueFull: No client holds more. `retry_after` is not set.
        """
        rows = Counter[str]()
        for one in self._jobs:
            rows[one.client] += one.rows
        mine = rows[job.client] + job.rows
        left, free = len(self._jobs), self._max_rows - self.rows
        gone: list[Job] = []
        while left and (left >= self._max_requests or job.rows > free):
            client, most = max(rows.items(), key=lambda item: item[1])
            if client == job.client or most <= mine:
                raise QueueFull(1)
            last = next(j for j in reversed(self._jobs) if j.client == client and j not in gone)
            gone.append(last)
            rows[client] -= last.rows
            left, free = left - 1, free + last.rows
        for one in gone:
            self.remove(one)
        flow = (job.client, job.price.bit_length())
        job.start = max(self._clock, self._ends.get(flow, 0.0))
        self._ends[flow] = job.start + job.price
        bisect.insort(self._jobs, job, key=lambda one: one.start)
        self.rows += job.rows
        return gone

    def remove(self, job: Job) -> bool:
        """Takes a request out; False if it is not there any more."""
        if job not in self._jobs:
            return False
        self._jobs.remove(job)
        self.rows -= job.rows
        if not self._jobs:
            self._ends.clear()
            self._clock = 0.0
        return True

    def take(self, now: float, max_rows: int, pace: Pace) -> tuple[list[Job], list[Job]]:
        """The next batch, and the requests that are out of time; both leave the queue.

        A batch is the first request and those behind it with the same options, up to `max_rows`
        beams and as long as all are expected to be answered in time.
        """
        batch: list[Job] = []
        late: list[Job] = []
        rows = price = 0
        latest = 0.0
        for job in self._jobs:
            if job.deadline <= now:
                late.append(job)
            elif not batch:
                if now + pace.expected(job.price) > job.deadline:
                    pace.doubt(job.price)
                    late.append(job)
                    continue
                batch, rows, price, latest = [job], job.rows, job.price, job.deadline
            elif job.options == batch[0].options and rows + job.rows <= max_rows:
                until = min(latest, job.deadline)
                if now + pace.expected(price + job.price) <= until:
                    batch.append(job)
                    rows, price, latest = rows + job.rows, price + job.price, until
        if batch:
            self._clock = batch[0].start
        for job in (*batch, *late):
            self.remove(job)
        return batch, late
