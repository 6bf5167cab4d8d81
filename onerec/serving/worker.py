"""The engine thread: takes what is queued, decodes it together, answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onerec.inference import Recommendation, Recommender
from onerec.inference.exported import ENGINE
from onerec.model.pretrained import CONFIG
from onerec.serving.answer import Answer, Version
from onerec.serving.metrics import Metrics
from onerec.tokenizer import Catalog


class QueueFull(Exception):
    """As many requests wait as may; `retry_after` is a guess in seconds when one more fits."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is stopping and takes no more requests."""


class Expired(Exception):
    """The request's deadline passed while it waited."""


class NoEarlierVersion(Exception):
    """There is nothing to roll back to."""


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
    dense_weight: float = 0.0


@dataclass
class _Job:
    history: list[Any]
    exclude: list[Any]
    options: Options
    arrived: float
    deadline: float
    reply: asyncio.Future[Answer]


class Worker:
    """One thread that owns the engine; requests wait in a bounded queue.

    A batch is what waits when the engine becomes free, without any wait for more: the oldest
    request and those behind it that ask for the same options, up to `max_rows` beams. A request
    whose deadline has passed is dropped before it costs anything.

    Args:
        recommender: What to serve first.
        metrics: Where to count.
        source: Name of the first version.
        max_queue: See `ServeConfig`.
        max_rows: See `ServeConfig`.
        keep_versions: See `ServeConfig`.
    """

    def __init__(
        self,
        recommender: Recommender,
        metrics: Metrics,
        *,
        source: str = "",
        max_queue: int = 256,
        max_rows: int = 1024,
        keep_versions: int = 1,
    ) -> None:
        self._metrics, self._max_queue, self._max_rows = metrics, max_queue, max_rows
        self._keep_versions = keep_versions
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._swapping = threading.Lock()
        self._stopping = False
        self._seconds = 0.05  # of a batch, smoothed; for Retry-After
        self._earlier: list[Version] = []
        self._version = Version(1, recommender, source)
        metrics.version.set(1)
        metrics.queue.set_function(lambda: len(self._queue))
        self._thread = threading.Thread(target=self._work, name="onerec-engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> Version:
        """What the next batch is made by."""
        return self._version

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    async def ask(
        self, history: list[Any], exclude: list[Any], options: Options, seconds: float
    ) -> Answer:
        """Queues a request and waits for its answer.

        Args:
            history: Item ids, oldest first.
            exclude: Item ids never to show.
            options: The rest.
            seconds: How long it may wait in the queue.

        Raises:
            QueueFull: As many requests wait as may.
            Draining: The worker is stopping.
            Expired: It waited too long.
            TypeError, ValueError: As `Recommender.recommend` or `rank`.
        """
        now = time.monotonic()
        reply: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._stopping:
                raise Draining("the server is stopping")
            if len(self._queue) >= self._max_queue:
                self._metrics.rejected.inc()
                rows = len(self._queue) * options.beam_width
                raise QueueFull(max(1, round(rows / self._max_rows * self._seconds)))
            self._queue.append(_Job(history, exclude, options, now, now + seconds, reply))
            self._changed.notify()
        return await reply

    def swap(self, folder: str | Path) -> Version:
        """Serves another export, or another catalogue with the same model, from the next batch on.

        Batches under way finish on the version that they began with. If anything is wrong with the
        folder, nothing changes.

        Args:
            folder: Of `onerec export`; without engine.bin and config.json, of `Catalog.save`.

        Raises:
            FileNotFoundError: A file is missing.
            DataError: A file is broken, or does not fit the others.
            ValueError: A catalogue that does not fit the model.
        """
        folder = Path(folder)
        with self._swapping:
            current = self._version.recommender
            # An export that is not there as a whole is not a catalogue for another network.
            if any((folder / name).exists() for name in (ENGINE, CONFIG)):
                new = Recommender.from_exported(folder, num_threads=current.num_threads)
            else:
                new = current.with_catalog(Catalog.load(folder))
            new.warmup(beam_width=8)
            return self._serve(new, str(folder), keep=True)

    def rollback(self) -> Version:
        """Serves again what was served before the last swap.

        Raises:
            NoEarlierVersion: There is none in memory.
        """
        with self._swapping:
            if not self._earlier:
                raise NoEarlierVersion("no earlier version is kept")
            before = self._earlier.pop()
            return self._serve(before.recommender, before.source, keep=False)

    def _serve(self, recommender: Recommender, source: str, *, keep: bool) -> Version:
        if keep:
            self._earlier.append(self._version)
            del self._earlier[: len(self._earlier) - self._keep_versions]
        self._version = Version(self._version.number + 1, recommender, source)
        self._metrics.version.set(self._version.number)
        self._metrics.swaps.inc()
        return self._version

    def stop(self) -> None:
        """Takes no more requests, answers those that wait, and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if not self._queue:
                    return
                batch = self._take()
            if batch:
                self._answer(batch)

    def _take(self) -> list[_Job]:
        """The next batch, out of the queue; expired requests are answered so."""
        now = time.monotonic()
        batch: list[_Job] = []
        left: deque[_Job] = deque()
        rows = 0
        for job in self._queue:
            fits = not batch or (
                job.options == batch[0].options and rows + job.options.beam_width <= self._max_rows
            )
            if job.deadline > now and not fits:
                left.append(job)
            elif job.reply.cancelled():
                continue  # nobody waits for it any more
            elif job.deadline <= now:
                self._metrics.expired.inc()
                _settle(job, Expired("the deadline passed in the queue"))
            else:
                batch.append(job)
                rows += job.options.beam_width
        self._queue = left
        return batch

    def _answer(self, batch: list[_Job]) -> None:
        version = self._version
        start = time.monotonic()
        try:
            found: Sequence[Recommendation | Exception] = _decode(version, batch)
        except Exception:  # one request's fault: each on its own
            found = [_attempt(version, job) for job in batch]
        seconds = time.monotonic() - start
        self._seconds += 0.2 * (seconds - self._seconds)
        for job, one in zip(batch, found, strict=True):
            if isinstance(one, Recommendation):
                waited = start - job.arrived
                _settle(job, Answer(one, version, waited, seconds, len(batch)))
            else:
                _settle(job, one)
        self._metrics.engine_seconds.observe(seconds)
        self._metrics.batch.observe(len(batch))


def _settle(job: _Job, result: Answer | Exception) -> None:
    """Hands a result to the event loop that waits for it."""

    def settle() -> None:
        if job.reply.cancelled():
            return
        if isinstance(result, Answer):
            job.reply.set_result(result)
        else:
            job.reply.set_exception(result)

    with suppress(RuntimeError):  # the loop is gone, and with it whoever waited
        job.reply.get_loop().call_soon_threadsafe(settle)


def _decode(version: Version, batch: list[_Job]) -> list[Recommendation]:
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


def _attempt(version: Version, job: _Job) -> Recommendation | Exception:
    try:
        return _decode(version, [job])[0]
    except Exception as error:
        return error
