"""A server in a thread or in a process, and clients of it."""

from __future__ import annotations

import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn

from onerec import OneRec, OneRecConfig, Recommender
from onerec.inference import Mixture
from onerec.inference.exported import export
from onerec.model.counting import CountRanker, popularity
from onerec.serving.app import create_app
from onerec.serving.config import ServeConfig
from onerec.serving.protocol import http_protocol
from onerec.tokenizer import Catalog

K, TOKEN, ADMIN = 16, "sesame", "open"


def make_catalog(seed: int, first: int) -> Catalog:
    """Sixty items, numbered from `first`."""
    sids = np.random.default_rng(seed).integers(0, K, (60, 3))
    return Catalog.build(list(range(first, first + 60)), sids, K)


def write_export(folder: Path, *, ranks: bool, seed: int = 0) -> Path:
    """An export with tags, of a network that ranks by a mixture or writes sessions."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"codebook_size": K, "session_length": 1 if ranks else 3}
    if ranks:
        fields |= {"encoder": "causal", "n_items": 60, "legal_softmax": True, "item_loss": 1.0}
    words = ["de", "nl", "fr"]
    catalog = make_catalog(seed, 0).with_tags([words[i % 3] for i in range(60)], words)
    model = OneRec(OneRecConfig.preset("paper-tiny", init_std=0.3, **fields)).eval()
    mixture = None
    if ranks:
        model.set_catalog(catalog.sids)
        seen = np.arange(60)
        mixture = Mixture(CountRanker([popularity(seen)], seen), np.ones(3), np.zeros(3))
    export(model, catalog, folder, mixture=mixture)
    return folder


class Server:
    """The app on a loopback port, in a thread."""

    def __init__(
        self,
        recommender: Recommender,
        config: ServeConfig,
        token: str | None,
        root_path: str = "",
        **rest: Any,
    ) -> None:
        rest.setdefault("admin_token", None if token is None else ADMIN)
        rest.setdefault("source", "first")
        self.app = create_app(recommender, config, token=token, **rest)
        protocol = http_protocol(config, self.app.state.metrics)
        settings: dict[str, Any] = {"http": protocol, "root_path": root_path}
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_config=None, **settings))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def send(
        self, method: str, path: str, body: Any = None, token: str | None = TOKEN, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded answer and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if token == TOKEN and path.startswith("/admin/"):
            token = ADMIN
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        headers.setdefault("Content-Type", "application/json")
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        kind = response.headers.get("content-type", "")
        got = json.loads(text) if kind.startswith("application/json") else text.decode()
        return response.status, got, {k.lower(): v for k, v in response.headers.items()}


class Slow:
    """A recommender that waits until it is let go."""

    def __init__(self, recommender: Recommender) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self._recommender = recommender

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recommender, name)

    def recommend(self, histories: Any, **options: Any) -> Any:
        self.batches.append(len(histories))
        self.entered.set()
        self.go.wait()
        return self._recommender.recommend(histories, **options)


def run_command(
    folder: Path,
    *arguments: str,
    limit: int | None = None,
    program: tuple[str, ...] = ("-m", "onerec"),
    **environment: str,
) -> tuple[subprocess.Popen[str], Server]:
    """`onerec serve` in a process that is ready, and a client of it.

    `limit` is the most open files that the process may have, `program` what Python runs.
    """

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *program, "serve", str(folder), "--port", str(port), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ONEREC_TOKEN": TOKEN, "ONEREC_ADMIN_TOKEN": ADMIN, **environment},
        preexec_fn=set_limit,
    )
    client = object.__new__(Server)
    client.port = port
    while True:
        try:
            assert client.send("GET", "/readyz", token=None)[0] == 200
            return process, client
        except ConnectionError:
            assert process.poll() is None
            time.sleep(0.05)
