"""Settings of `onerec serve`."""

from __future__ import annotations

from dataclasses import dataclass


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
        for name, least in (
            ("max_queue", 1),
            ("max_rows", 1),
            ("deadline_ms", 1),
            ("max_deadline_ms", 1),
            ("beam_width", 1),
            ("max_beam_width", 1),
            ("max_body_bytes", 1),
            ("max_history", 1),
            ("drain_seconds", 0),
            ("keep_versions", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must lie in 0..65535, got {self.port}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {self.num_threads}")
        if self.beam_width > self.max_beam_width:
            raise ValueError(
                f"beam_width must be at most max_beam_width = {self.max_beam_width}, "
                f"got {self.beam_width}"
            )
