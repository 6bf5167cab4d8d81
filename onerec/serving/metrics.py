"""What the server counts, in the Prometheus text format."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from onerec._version import __version__
from onerec.serving.answer import Version

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for every counter, which nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("onerec_build", "The library.", registry=registry).info({"version": __version__})
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
        self.queue_rows = Gauge("onerec_queue_rows", "Their beams.", registry=registry)
        self.rejected = Counter(
            "onerec_rejected", "Requests refused because the queue was full.", registry=registry
        )
        self.expired = Counter(
            "onerec_expired",
            "Requests whose deadline passed in the queue, or would have in the engine.",
            registry=registry,
        )
        self.abandoned = Counter(
            "onerec_abandoned", "Requests whose client left while they waited.", registry=registry
        )
        self.connections = Gauge("onerec_connections", "Open connections.", registry=registry)
        self.closed = Counter(
            "onerec_connections_closed",
            "Connections closed by the server, by the limit that they met.",
            ["limit"],
            registry=registry,
        )
        self.empty = Counter(
            "onerec_empty_answers", "Answers without an item, by arm.", ["arm"], registry=registry
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
        self.served = Gauge(
            "onerec_served",
            "1 for what each arm serves.",
            ["arm", "version", "export", "quantizer"],
            registry=registry,
        )
        self.arm_answers = Counter(
            "onerec_arm_answers", "Answers of the engine, by arm.", ["arm"], registry=registry
        )
        self.arm_items = Counter(
            "onerec_arm_items", "Items recommended, by arm.", ["arm"], registry=registry
        )
        self.arm_seconds = Histogram(
            "onerec_arm_seconds",
            "Queue and engine of an answer, by arm.",
            ["arm"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._labels: dict[str, tuple[str, ...]] = {}

    def changed(self, version: Version) -> None:
        """Tells that an arm serves this version from now on."""
        if before := self._labels.get(version.arm):
            self.swaps.inc()
            self.served.remove(*before)
        lineage = version.recommender.lineage
        labels = (version.arm, str(version.number), lineage.export, lineage.quantizer)
        self._labels[version.arm] = labels
        self.served.labels(*labels).set(1)
        if version.arm == "a":
            self.version.set(version.number)

    def text(self) -> bytes:
        """All of it in the exposition format."""
        return generate_latest(self.registry)
