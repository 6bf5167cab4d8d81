"""The engine thread: takes what is queued, decodes it together, answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from onerec.inference import Recommendation
from onerec.serving.answer import Answer, Version
from onerec.serving.config import ServeConfig
from onerec.serving.metrics import Metrics
from onerec.serving.queue import FairQueue, Job, Options, Pace, QueueFull
from onerec.serving.versions import Draining, Versions


class Expired(Exception):
    """The request's deadline passed, or would have before the engine was done with it."""


class Worker:
    """One thread that owns the engine; requests wait in a bounded, fair queue.

    A batch is what waits when the engine becomes free, without any wait for more: the next request
    (see `FairQueue`) and others that ask for the same options, up to `max_rows` beams. A request
    whose deadline has passed, or whose client has gone, is dropped before it costs anything.

    Args:
        arms: What to serve, by the name of the arm.
        metrics: Where to count.
        config: `max_queue`, `max_queue_rows`, `max_rows` and `stall_seconds` of it.
    """

    def __init__(self, arms: dict[str, Versions], metrics: Metrics, config: ServeConfig) -> None:
        self.arms = arms
        self._metrics, self._config = metrics, config
        self._queue = FairQueue(config.max_queue, config.max_queue_rows)
        self._pace = Pace()
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 0.05  # of a batch, smoothed; for Retry-After
        self._began: float | None = None
        metrics.queue.set_function(lambda: len(self._queue))
        metrics.queue_rows.set_function(lambda: self._queue.rows)
        self._thread = threading.Thread(target=self._work, name="onerec-engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> Version:
        """What the next batch of the first arm is made by."""
        return self.arms["a"].now

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the engine makes progress."""
        began = self._began
        stalled = began is not None and time.monotonic() - began > self._config.stall_seconds
        return self._thread.is_alive() and not self._stopping and not stalled

    def submit(
        self,
        history: list[Any],
        exclude: list[Any],
        options: Options,
        seconds: float,
        client: str = "",
    ) -> asyncio.Future[Answer]:
        """Queues a request. Its answer is a future of the running loop; to cancel it drops it.

        Args:
            history: Item ids, oldest first.
            exclude: Item ids never to show.
            options: The rest.
            seconds: How long it may take.
            client: Whose it is.

        Raises:
            QueueFull: As much waits as may.
            Draining: The worker is stopping.
            Expired: The engine is expected to take longer.
        """
        now = time.monotonic()
        config = self.arms[options.arm].now.recommender.config
        items = 1 if options.k is not None else options.session_length or config.session_length
        price = options.beam_width * items * config.levels
        reply: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        job = Job(history, exclude, options, client, price, now, now + seconds, reply)
        with self._changed:
            if self._stopping:
                raise Draining("the server is stopping")
            if self._pace.expected(price) > seconds:
                self._pace.doubt(price)
                self._metrics.expired.inc()
                raise Expired("the engine is expected to take longer than the deadline")
            try:
                gone = self._queue.push(job)
            except QueueFull:
                self._metrics.rejected.inc()
                raise QueueFull(self._retry_after()) from None
            self._changed.notify()
        for one in gone:
            self._metrics.rejected.inc()
            _settle(one, QueueFull(self._retry_after()))
        reply.add_done_callback(lambda _: self._drop(job))
        return reply

    async def ask(
        self,
        history: list[Any],
        exclude: list[Any],
        options: Options,
        seconds: float,
        client: str = "",
    ) -> Answer:
        """Queues a request and waits for its answer.

        Arguments and errors are those of `submit`, and those of `Recommender.recommend` or `rank`.
        """
        return await self.submit(history, exclude, options, seconds, client)

    def stop(self, seconds: float | None = None) -> None:
        """Takes no more requests, answers those that wait, and ends the thread.

        Args:
            seconds: Longest wait for that; None: any.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _retry_after(self) -> int:
        return max(1, round(self._queue.rows / self._config.max_rows * self._seconds))

    def _drop(self, job: Job) -> None:
        """Forgets a request whose client has gone, with the room that it took in the queue."""
        if job.reply.cancelled():
            with self._changed:
                if self._queue.remove(job):
                    self._metrics.abandoned.inc()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not len(self._queue) and not self._stopping:
                    self._changed.wait()
                if not len(self._queue):
                    return
                batch, late = self._queue.take(time.monotonic(), self._config.max_rows, self._pace)
            for job in late:
                self._metrics.expired.inc()
                _settle(job, Expired("the deadline passed, or would have before the answer"))
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[Job]) -> None:
        version = self.arms[batch[0].options.arm].now
        start = self._began = time.monotonic()
        try:
            found: Sequence[Recommendation | Exception] = _decode(version, batch)
        except Exception:  # one request's fault: each on its own
            found = [_attempt(version, job) for job in batch]
        seconds = time.monotonic() - start
        self._began = None
        self._seconds += 0.2 * (seconds - self._seconds)
        self._pace.note(sum(job.price for job in batch), seconds)
        for job, one in zip(batch, found, strict=True):
            if isinstance(one, Recommendation):
                waited = start - job.arrived
                _settle(job, Answer(one, version, waited, seconds, len(batch)))
            else:
                _settle(job, one)
        self._metrics.engine_seconds.observe(seconds)
        self._metrics.batch.observe(len(batch))


def _settle(job: Job, result: Answer | Exception) -> None:
    """Hands a result to the event loop that waits for it."""

    def settle() -> None:
        if job.reply.done():
            return
        if isinstance(result, Answer):
            job.reply.set_result(result)
        else:
            job.reply.set_exception(result)

    with suppress(RuntimeError):  # the loop is gone, and with it whoever waited
        job.reply.get_loop().call_soon_threadsafe(settle)


def _decode(version: Version, batch: list[Job]) -> list[Recommendation]:
    o = batch[0].options
    histories = [job.history for job in batch]
    common: dict[str, Any] = {
        "beam_width": o.beam_width,
        "exclude": [job.exclude for job in batch],
        "exclude_history": o.exclude_history,
        "allow_tags": None if o.allow_tags is None else [list(o.allow_tags)] * len(batch),
        "scoring": o.scoring,
        "temperature": o.temperature,
    }
    if o.k is not None:
        ranked = version.recommender.rank(histories, o.k, dense_weight=o.dense_weight, **common)
        nothing = np.empty((0, 0, 0), dtype=np.int32)
        return [Recommendation([items], [], nothing) for items in ranked]
    return version.recommender.recommend(
        histories, session_length=o.session_length, num_sessions=o.num_sessions, **common
    )


def _attempt(version: Version, job: Job) -> Recommendation | Exception:
    try:
        return _decode(version, [job])[0]
    except Exception as error:
        return error
