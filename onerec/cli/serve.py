"""`onerec serve`: recommendations over HTTP."""

from __future__ import annotations

import dataclasses
import os

from onerec.errors import OneRecError
from onerec.serving.config import ServeConfig


def main(argv: list[str]) -> None:
    from onerec.cli.options import Parser

    parser = Parser(
        "serve",
        "Serves a folder of `onerec export` over HTTP: POST /v1/recommend; /docs shows the rest. "
        "Where the environment variable ONEREC_TOKEN is set, requests must bring it as a bearer "
        "token; /admin/swap and /admin/rollback exist where ONEREC_ADMIN_TOKEN is set.",
        usage="FOLDER [options]",
    )
    parser.add_argument("folder", type=str, help="folder that `onerec export` wrote")
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_class_arguments(ServeConfig)
    options = parser.parse(argv)
    try:
        config = ServeConfig(**{f.name: options[f.name] for f in dataclasses.fields(ServeConfig)})
    except ValueError as error:
        parser.error(str(error))
    if config.num_threads is None:
        threads = max(1, (os.cpu_count() or 1) - 1)
        config = dataclasses.replace(config, num_threads=threads)
    try:
        from onerec.serving.run import serve
    except ImportError as error:
        raise OneRecError(
            f'`onerec serve` needs the extra: pip install "onerec[serve]" ({error})'
        ) from None
    serve(options.folder, config)
