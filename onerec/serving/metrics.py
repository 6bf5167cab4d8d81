"""What the server counts, in the Prometheus text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
