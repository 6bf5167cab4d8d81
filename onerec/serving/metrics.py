"""What the server counts, in the Prometheus text format."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from onerec.inference import Recommender
    from onerec.serving.answer import Answer

log = logging.getLogger("onerec.serving")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "onerec_requests", "Answers by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "onerec_request_seconds",
            "From the first byte to the answer, by path.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "onerec_queue_seconds", "Wait for the engine.", buckets=_SECONDS, registry=registry
        )
        self.engine_seconds = Histogram(
            "onerec_engine_seconds", "One engine call.", buckets=_SECONDS, registry=registry
        )
        self.batch = Histogram(
            "onerec_batch_requests",
            "Requests decoded together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.queue = Gauge("onerec_queue_length", "Requests that wait.", registry=registry)
        self.rejected = Counter(
            "onerec_rejected", "Requests refused because the queue was full.", registry=registry
        )
        self.expired = Counter(
            "onerec_expired", "Requests whose deadline passed in the queue.", registry=registry
        )
        self.items = Counter("onerec_items", "Items recommended.", registry=registry)
        self.illegal = Counter(
            "onerec_items_illegal",
            "Of them, items not in the catalogue that served them; 0 by construction.",
            registry=registry,
        )
        self.version = Gauge(
            "onerec_version", "Version of model and catalogue being served.", registry=registry
        )
        self.swaps = Counter("onerec_swaps", "Swaps and rollbacks.", registry=registry)

    def text(self) -> bytes:
        """All of it in the exposition format."""
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that has been answered.

    Attributes:
        ended: Seconds since 1970.
        seconds: From its headers to the end of its answer.
        request_id: Its own or the server's.
        method: Of HTTP.
        path: Of the route; "other" for none.
        status: Of HTTP.
        answer: The engine's, if it got that far.
    """

    ended: float
    seconds: float
    request_id: str
    method: str
    path: str
    status: int
    answer: Answer | None


class Journal:
    """Counts and logs answered requests a moment later, so that no request waits for that."""

    DELAY = 0.01  # seconds

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._entries: list[Entry] = []

    def note(self, entry: Entry) -> None:
        """Keeps an entry; `write` follows by itself. Called in an event loop."""
        if not self._entries:
            asyncio.get_running_loop().call_later(self.DELAY, self.write)
        self._entries.append(entry)

    def write(self) -> None:
        """Counts and logs what is kept."""
        entries, self._entries = self._entries, []
        given: dict[Recommender, list[Any]] = {}
        for entry in entries:
            self._count(entry)
            if entry.answer is not None:
                items = given.setdefault(entry.answer.version.recommender, [])
                items += itertools.chain(*entry.answer.recommendation.item_ids)
            if log.isEnabledFor(logging.INFO):
                self._log(entry)
        for recommender, items in given.items():
            self._metrics.items.inc(len(items))
            if items:
                self._metrics.illegal.inc(int((recommender.catalog.find(items) < 0).sum()))

    def _count(self, entry: Entry) -> None:
        self._metrics.requests.labels(entry.path, str(entry.status)).inc()
        self._metrics.seconds.labels(entry.path).observe(entry.seconds)
        if entry.answer is not None:
            self._metrics.wait_seconds.observe(entry.answer.waited)

    def _log(self, entry: Entry) -> None:
        fields: dict[str, Any] = {"request_id": entry.request_id}
        if (answer := entry.answer) is not None:
            fields.update(
                version=answer.version.number,
                queue_ms=round(1000 * answer.waited, 3),
                engine_ms=round(1000 * answer.seconds, 3),
                batch=answer.batch,
            )
        fields.update(method=entry.method, path=entry.path, status=entry.status)
        fields["ms"] = round(1000 * entry.seconds, 3)
        record = log.makeRecord(
            log.name, logging.INFO, "", 0, "request", (), None, extra={"fields": fields}
        )
        record.created, record.msecs = entry.ended, entry.ended % 1 * 1000
        log.handle(record)
