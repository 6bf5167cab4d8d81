"""Settings of `onerec serve`."""

from __future__ import annotations

from dataclasses import dataclass

from onerec.checks import at_least, at_least_or_none, between, positive, wanted


@dataclass(frozen=True)
class ServeConfig:
    """Limits and defaults of the server.

    Attributes:
        host: Address to listen on; the default is this machine alone.
        port: TCP port; 0 takes a free one.
        num_threads: Threads of the engine. None: one less than the machine has cores, at least one,
            so that accepting requests does not wait for the engine.
        max_queue: Requests that may wait; one more is answered with 429.
        max_queue_rows: Beams of all requests that may wait; more are answered with 429.
        max_rows: Beams (requests times beam width) that one engine call takes.
        deadline_ms: Milliseconds from arrival after which a request that still waits is dropped
            (504), unless it brings its own. A request that the engine is not expected to answer in
            time is dropped before it costs anything.
        max_deadline_ms: Longest deadline that a request may ask for, in milliseconds.
        beam_width: Of a request that does not say.
        max_beam_width: Largest that a request may ask for.
        max_batch: Most users of a request to one of the batch routes.
        max_body_bytes: Larger bodies are answered with 413.
        max_history: Most items of a history or of an exclude list.
        max_head_bytes: A connection whose request line and headers take more is closed (431).
        head_seconds: A connection that has sent no whole head after this time is closed (408).
        body_seconds: The same for the body, and for a client that does not read its answer.
        idle_seconds: A connection is closed after this time without a request.
        max_connections: Connections at once. One more closes the one that has been silent longest,
            of the address that has the most; where none is silent it is answered with 503. The
            process's limit of open files may set fewer.
        client_header: Header that names the client, for fair shares of the queue, e.g.
            `X-Real-IP` where a proxy sets it; None takes the address of the connection.
        drain_seconds: After SIGTERM, how long answers may take that are under way; the process has
            ended then.
        keep_versions: Earlier versions kept in memory for a rollback.
        exports: Folder below which the folder of a swap must lie; None: any folder of the machine.
        swap_seconds: A swap that has not loaded its folder after this time is given up.
        min_items_share: A swap to a catalogue with fewer items than this share of the running one
            is refused unless it is forced.
        stall_seconds: An engine call that takes longer makes `/readyz` answer 503.
        challenger: Folder of `onerec export` that is arm "b" of an A/B split; None: no split.
        split: Share of the users, by a hash of their ids, who get arm "b".
        served_log: Folder for a log of the items served; None: none.
        served_log_megabytes: A file of that log is ended when it is larger.
        users: SQLite file of the users' histories, for requests that name a user, `/v1/events` and
            `/v1/users`. One that does not exist is made from the run's users (see `run`). None:
            histories come with the requests.
        page: Whether `/` shows a page to try it: items by text or id, and what is recommended.
        run: Folder of the run whose texts and users the page offers, and whose users a new file
            `users` holds. None: the run that the folder lies in, if it does; elsewhere the page has
            ids and no users.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    num_threads: int | None = None
    max_queue: int = 256
    max_queue_rows: int = 16_384
    max_rows: int = 1024
    deadline_ms: int = 2000
    max_deadline_ms: int = 60_000
    beam_width: int = 128
    max_beam_width: int = 256
    max_batch: int = 64
    max_body_bytes: int = 1 << 20
    max_history: int = 10_000
    max_head_bytes: int = 1 << 15
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0  # longer than load balancers keep a connection idle
    max_connections: int = 1000
    client_header: str | None = None
    drain_seconds: int = 30
    keep_versions: int = 1
    exports: str | None = None
    swap_seconds: float = 300.0
    min_items_share: float = 0.5
    stall_seconds: float = 60.0
    challenger: str | None = None
    split: float = 0.5
    served_log: str | None = None
    served_log_megabytes: int = 64
    users: str | None = None
    page: bool = True
    run: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "max_queue", "max_queue_rows", "max_rows", "deadline_ms")
        at_least(self, 1, "max_deadline_ms", "beam_width", "max_beam_width", "max_batch")
        at_least(self, 1, "max_body_bytes", "max_history", "max_connections")
        at_least(self, 1, "served_log_megabytes")
        at_least(self, 256, "max_head_bytes")
        at_least(self, 0, "drain_seconds", "keep_versions")
        positive(self, "head_seconds", "body_seconds", "idle_seconds", "swap_seconds")
        positive(self, "stall_seconds")
        between(self, 0, 1, "min_items_share", "split")
        between(self, 0, 65535, "port")
        at_least_or_none(self, 1, "num_threads")
        if self.beam_width > self.max_beam_width:
            what = f"at most max_beam_width = {self.max_beam_width}"
            raise wanted("beam_width", what, self.beam_width)
