"""`onerec serve`: recommendations over HTTP."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from typing import Any

from onerec.errors import OneRecError
from onerec.serving.config import ServeConfig


def main(argv: list[str]) -> None:
    from onerec.cli.options import Parser

    parser = Parser(
        "serve",
        "Serves a folder of `onerec export` over HTTP: POST /v1/recommend; /docs shows the rest. "
        "Where the environment variable ONEREC_TOKEN is set, requests must bring it as a bearer "
        "token, and /admin/swap and /admin/rollback exist.",
        usage="FOLDER [options]",
    )
    parser.add_argument("folder", type=str, help="folder that `onerec export` wrote")
    parser.add_class_arguments(ServeConfig)
    options = parser.parse(argv)
    try:
        config = ServeConfig(**{f.name: options[f.name] for f in dataclasses.fields(ServeConfig)})
    except ValueError as error:
        parser.error(str(error))
    try:
        import uvicorn

        from onerec.serving.app import JsonLines, create_app
    except ImportError as error:
        raise OneRecError(
            f'`onerec serve` needs the extra: pip install "onerec[serve]" ({error})'
        ) from None

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if config.num_threads is None:
        threads = max(1, (os.cpu_count() or 1) - 1)
        config = dataclasses.replace(config, num_threads=threads)

    from onerec.inference import Recommender

    recommender = Recommender.from_exported(
        options.folder, num_threads=config.num_threads, max_rows=config.max_rows
    )
    recommender.warmup(beam_width=config.beam_width)
    app = create_app(
        recommender, config, token=os.environ.get("ONEREC_TOKEN"), source=options.folder
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=http_protocol(),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody asks who the client is
            timeout_graceful_shutdown=config.drain_seconds,
            timeout_keep_alive=75,  # longer than load balancers keep a connection idle
        )
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


def http_protocol() -> Any:
    """What uvicorn takes as `http`: its protocol with one system call an answer, if it can."""
    try:
        from onerec.serving.protocol import OneWrite
    except ImportError:  # without httptools uvicorn has a parser in Python
        return "auto"
    return OneWrite


def _ignore(*_: Any) -> None:
    pass
