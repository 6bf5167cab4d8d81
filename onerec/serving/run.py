"""`onerec serve`: the application in a process of its own, from its start to its end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from onerec.errors import OneRecError
from onerec.inference import Recommender
from onerec.serving.app import JsonLines, create_app
from onerec.serving.config import ServeConfig
from onerec.serving.protocol import http_protocol
from onerec.serving.users import UserStore, histories_of_run

log = logging.getLogger("onerec.serving")


def serve(folder: str, config: ServeConfig) -> None:
    """Serves a folder until SIGTERM or SIGINT; answers what it has and returns.

    The tokens are those of the environment, ONEREC_TOKEN and ONEREC_ADMIN_TOKEN.

    Args:
        folder: Of `onerec export`.
        config: Limits and defaults; `num_threads` is given.

    Raises:
        OneRecError: The folder cannot be served, or the port is taken.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)

    def loaded(path: str) -> Recommender:
        found = Recommender.from_exported(
            path, num_threads=config.num_threads, max_rows=config.max_rows
        )
        found.warmup(beam_width=config.beam_width)
        return found

    users = None if config.users is None else _users(config, folder)
    try:
        app = create_app(
            loaded(folder),
            config,
            token=os.environ.get("ONEREC_TOKEN"),
            admin_token=os.environ.get("ONEREC_ADMIN_TOKEN"),
            source=folder,
            challenger=None if config.challenger is None else loaded(config.challenger),
            challenger_source=config.challenger or "",
            users=users,
        )
    except ValueError as error:
        raise OneRecError(str(error)) from None
    server = _Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=http_protocol(config, app.state.metrics),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `client_header` says who the client is
            timeout_graceful_shutdown=config.drain_seconds,
            timeout_keep_alive=int(config.idle_seconds) + 1,  # the protocol is the first to close
        ),
        config.drain_seconds,
    )
    # An answer waits for the interpreter's lock no longer than this when the engine thread has it.
    sys.setswitchinterval(0.0005)
    # uvicorn drains on a signal and raises it again for whoever handled it before: nothing is left
    # to do then, and the exit code is 0.
    before = {name: signal.signal(name, _ignore) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    except SystemExit:  # uvicorn's way out where it cannot listen; it has logged the reason
        pass
    finally:
        for name, previous in before.items():
            signal.signal(name, previous)
    if not server.started:
        raise OneRecError(f"cannot listen on {config.host}:{config.port}")


def _users(config: ServeConfig, folder: str) -> UserStore:
    """The store of `config.users`, made from the run's users where there is no such file."""
    path = Path(config.users or "")
    if not path.exists():
        run = Path(folder).resolve().parent if config.run is None else Path(config.run)
        UserStore.make(path, histories_of_run(run, config.max_history))
        log.info("users", extra={"fields": {"made": str(path), "run": str(run)}})
    return UserStore(path, config.max_history)


class _Server(uvicorn.Server):
    """uvicorn's server, which gives up swaps when it is to end, and ends in any case."""

    def __init__(self, config: Any, drain_seconds: int) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            last = threading.Timer(self._drain_seconds + 2, _end)
            last.daemon = True
            last.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        self.config.app.state.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def _end() -> None:
    """Ends the process where something hangs that no exception reaches."""
    log.error("not all was answered within drain_seconds")
    os._exit(1)


def _ignore(*_: Any) -> None:
    pass
