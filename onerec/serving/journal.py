"""What is noted of an answered request: counters, a log line, the items served."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

from onerec.inference import Recommender
from onerec.serving.answer import Entry
from onerec.serving.metrics import Metrics
from onerec.serving.served import ServedLog

log = logging.getLogger("onerec.serving")


class Journal:
    """Counts and logs answered requests a moment later, so that no request waits for that."""

    DELAY = 0.01  # seconds

    def __init__(self, metrics: Metrics, served: ServedLog | None = None) -> None:
        self._metrics, self._served = metrics, served
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
            for answer in entry.answers:
                items = given.setdefault(answer.version.recommender, [])
                items += itertools.chain(*answer.recommendation.item_ids)
            if log.isEnabledFor(logging.INFO):
                self._log(entry)
            if self._served is not None and entry.answers and entry.status == 200:
                self._served.note(entry)
        for recommender, items in given.items():
            self._metrics.items.inc(len(items))
            if items:
                self._metrics.illegal.inc(int((recommender.catalog.find(items) < 0).sum()))

    def _count(self, entry: Entry) -> None:
        self._metrics.requests.labels(entry.path, str(entry.status)).inc()
        self._metrics.seconds.labels(entry.path).observe(entry.seconds)
        for answer in entry.answers:
            arm, items = answer.version.arm, sum(map(len, answer.recommendation.item_ids))
            self._metrics.wait_seconds.observe(answer.waited)
            self._metrics.arm_answers.labels(arm).inc()
            self._metrics.arm_items.labels(arm).inc(items)
            self._metrics.arm_seconds.labels(arm).observe(answer.waited + answer.seconds)
            self._metrics.empty.labels(arm).inc(not items)

    def _log(self, entry: Entry) -> None:
        fields: dict[str, Any] = {"request_id": entry.request_id, "client": entry.client}
        if entry.answers:
            answer = max(entry.answers, key=lambda one: one.waited + one.seconds)
            fields.update(
                version=answer.version.number,
                arm=answer.version.arm,
                export=answer.version.recommender.lineage.export,
                queue_ms=round(1000 * answer.waited, 3),
                engine_ms=round(1000 * answer.seconds, 3),
                batch=answer.batch,
                empty=sum(not any(one.recommendation.item_ids) for one in entry.answers),
            )
        fields.update(method=entry.method, path=entry.path, status=entry.status)
        fields["ms"] = round(1000 * entry.seconds, 3)
        record = log.makeRecord(
            log.name, logging.INFO, "", 0, "request", (), None, extra={"fields": fields}
        )
        record.created, record.msecs = entry.ended, entry.ended % 1 * 1000
        log.handle(record)
