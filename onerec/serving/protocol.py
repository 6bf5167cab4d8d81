"""uvicorn's HTTP protocol with limits, and with one system call an answer."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
from collections import Counter
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from onerec.serving.config import ServeConfig

if TYPE_CHECKING:
    from onerec.serving.metrics import Metrics

log = logging.getLogger("onerec.serving")
_FILES = 64  # descriptors that are left to files, libraries and the event loop
_ANSWERS = {
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


def http_protocol(config: ServeConfig | None = None, metrics: Metrics | None = None) -> Any:
    """What uvicorn takes as `http`: its protocol under the limits of a config.

    Args:
        config: `max_head_bytes`, `head_seconds`, `body_seconds`, `idle_seconds`, `max_body_bytes`
            and `max_connections` of it.
        metrics: Where to count connections and those that were closed.
    """
    guard = Guard(ServeConfig() if config is None else config, metrics)
    return type("Guarded", (_Guarded, HttpToolsProtocol), {"guard": guard})


class Guard:
    """The connections of a server, and what is done about those over a limit.

    What a peer may take is bounded before its request is whole, and so before its token is seen: a
    parser would keep a head of any size, and a silent connection costs a file descriptor.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics | None) -> None:
        self.config, self.metrics = config, metrics
        # Chunks may be small, and each has a head of its own.
        self.max_body_bytes = 4 * config.max_body_bytes + config.max_head_bytes
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = config.max_connections
        if limit != resource.RLIM_INFINITY:
            self.most = max(1, min(self.most, limit - _FILES))
        self.open: dict[_Guarded, None] = {}  # oldest first
        self._told: dict[str, float] = {}
        self._untold: Counter[str] = Counter()
        self._tick_at: float | None = None
        shortest = min(config.head_seconds, config.body_seconds, config.idle_seconds)
        self._interval = min(1.0, shortest / 4)

    def add(self, one: _Guarded) -> None:
        """Takes a new connection; where there are too many, one of them goes."""
        self.open[one] = None
        if self.metrics is not None:
            self.metrics.connections.set(len(self.open))
        if self._tick_at is None:
            self._schedule(one.loop)
        if len(self.open) > self.most:
            silent = [c for c in self.open if c is not one and c.phase in ("head", "idle")]
            of_address = Counter(c.address for c in silent)
            victim = max(silent, key=lambda c: (of_address[c.address], -c.since), default=one)
            self.close(victim, "connections", 503)

    def discard(self, one: _Guarded) -> None:
        """Forgets a connection that has ended."""
        self.open.pop(one, None)
        if self.metrics is not None:
            self.metrics.connections.set(len(self.open))

    def close(self, one: _Guarded, reason: str, status: int) -> None:
        """Ends a connection, with an answer if none is under way and it has asked for something."""
        self._note(reason, one.address)
        if one.phase in ("head", "body") and (one.seen or status == 503) and not one.answering:
            head = b"HTTP/1.1 %d %s\r\n" % (status, _ANSWERS[status])
            one.transport.write(head + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        one.leave()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._tick_at = loop.time() + self._interval
        loop.call_at(self._tick_at, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes what is overdue; time in which the loop itself was held up is nobody's fault."""
        now = loop.time()
        assert self._tick_at is not None
        late = now - self._tick_at
        for one in list(self.open):
            if late > self._interval:
                one.due += late
            elif one.due <= now:
                if one.phase == "left":
                    one.transport.abort()
                else:
                    reason, status = {
                        "head": ("head_seconds", 408),
                        "body": ("body_seconds", 408),
                        "idle": ("idle_seconds", 408),
                        "busy": ("unread", 408),
                    }[one.phase]
                    self.close(one, reason, status)
        for reason in [r for r, at in self._told.items() if now - at > 1]:
            del self._told[reason]
            if self._untold[reason]:
                self._tell(reason, "several", self._untold.pop(reason), now)
        if self.open or self._untold:
            self._schedule(loop)
        else:
            self._tick_at = None

    def _note(self, reason: str, address: str) -> None:
        if self.metrics is not None:
            self.metrics.closed.labels(reason).inc()
        if reason == "idle_seconds":  # the ordinary end of a connection that was kept open
            return
        if reason in self._told:
            self._untold[reason] += 1
        else:
            self._tell(reason, address, 1, asyncio.get_running_loop().time())

    def _tell(self, reason: str, address: str, count: int, now: float) -> None:
        self._told[reason] = now
        fields = {"limit": reason, "client": address, "connections": count}
        log.warning("connections closed at a limit", extra={"fields": fields})


class _Guarded:
    """A connection of uvicorn's protocol that a `Guard` watches.

    Phases: "head" (a head is wanted, and has perhaps begun), "body", "busy" (the answer is under
    way), "idle" (an answer has been given), "left" (closed on this side). `due` is when the phase
    must have ended, on the loop's clock.
    """

    guard: Guard
    loop: asyncio.AbstractEventLoop
    transport: Any
    cycle: Any
    client: Any
    flow: Any
    due: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[misc]
        self.address = str(self.client[0]) if self.client else ""
        self.since = self.loop.time()
        self.seen = 0
        self._enter("head")
        self.guard.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.guard.discard(self)
        super().connection_lost(error)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        while data and self.phase != "left" and not self.transport.is_closing():
            if self.phase == "idle":
                self._enter("head")
            body = self.phase == "body"
            most = self.guard.max_body_bytes if body else self.guard.config.max_head_bytes
            room = most - self.seen
            if room <= 0:
                return self.guard.close(self, *(("body", 413) if body else ("head", 431)))
            piece, data = data[:room], data[room:]
            self.seen += len(piece)
            before = self.cycle
            super().data_received(piece)  # type: ignore[misc]
            now = self._phase_now()
            if self.cycle is not before or now != self.phase:
                self._enter(now)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if self.phase != "left" and (now := self._phase_now()) != "body":
            self._enter("idle" if now == "head" else now)

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self.due = min(self.due, self.loop.time() + self.guard.config.body_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        if self.phase == "busy":
            self.due = math.inf

    @property
    def answering(self) -> bool:
        """Whether an answer has begun and not ended."""
        return self.cycle is not None and (
            self.cycle.response_started and not self.cycle.response_complete
        )

    def leave(self) -> None:
        """Closes, and at the latest some seconds later, whatever the peer does not read."""
        self._enter("left")
        self.transport.close()

    def _phase_now(self) -> str:
        if self.cycle is not None and self.cycle.more_body:
            return "body"  # also behind an answer that did not wait for all of it
        return "head" if self.cycle is None or self.cycle.response_complete else "busy"

    def _enter(self, phase: str) -> None:
        config = self.guard.config
        seconds = {
            "head": config.head_seconds,
            "body": config.body_seconds,
            "idle": config.idle_seconds,
            "busy": math.inf,
            "left": 5.0,
        }[phase]
        self.phase, self.seen, self.since = phase, 0, self.loop.time()
        if self.flow.write_paused:  # the peer does not read
            seconds = min(seconds, config.body_seconds)
        self.due = self.since + seconds


class _Joined:
    """A transport that holds what is written until more is, or until the loop's next turn.

    uvicorn writes the head when an application starts to answer, and the body a moment later: two
    system calls, and a client that wakes up twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._held = transport, loop, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._transport.write(data)
