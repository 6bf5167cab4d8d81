"""Settings of `onerec serve`."""

from __future__ import annotations

from dataclasses import dataclass

from onerec.checks import at_least, at_least_or_none, between, wanted


@dataclass(frozen=True)
class ServeConfig:
    """Limits and defaults of the server.

    Attributes:
        host: Address to listen on; the default is this machine alone.
        port: TCP port; 0 takes a free one.
        num_threads: Threads of the engine. None: one less than the machine has cores, at least one,
            so that accepting requests does not wait for the engine.
        max_queue: Requests that may wait; one more is answered with 429.
        max_rows: Beams (requests times beam width) that one engine call takes.
        deadline_ms: Milliseconds from arrival after which a request that still waits is dropped
            (504), unless it brings its own.
        max_deadline_ms: Longest deadline that a request may ask for, in milliseconds.
        beam_width: Of a request that does not say.
        max_beam_width: Largest that a request may ask for.
        max_body_bytes: Larger bodies are answered with 413.
        max_history: Most items of a history or of an exclude list.
        drain_seconds: After SIGTERM, how long answers may take that are under way.
        keep_versions: Earlier versions kept in memory for a rollback.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    num_threads: int | None = None
    max_queue: int = 256
    max_rows: int = 1024
    deadline_ms: int = 2000
    max_deadline_ms: int = 60_000
    beam_width: int = 128
    max_beam_width: int = 1024
    max_body_bytes: int = 1 << 20
    max_history: int = 10_000
    drain_seconds: int = 30
    keep_versions: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "max_queue", "max_rows", "deadline_ms", "max_deadline_ms", "beam_width")
        at_least(self, 1, "max_beam_width", "max_body_bytes", "max_history")
        at_least(self, 0, "drain_seconds", "keep_versions")
        between(self, 0, 65535, "port")
        at_least_or_none(self, 1, "num_threads")
        if self.beam_width > self.max_beam_width:
            what = f"at most max_beam_width = {self.max_beam_width}"
            raise wanted("beam_width", what, self.beam_width)
