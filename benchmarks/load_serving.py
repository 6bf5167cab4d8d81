"""Load on a server over loopback while its catalogue is swapped; every answer is checked.

    python benchmarks/load_serving.py --requests 10000 --swaps 50 --clients 8

Makes a network with random weights and catalogues with disjoint items, serves the first one with
`onerec serve`, and swaps among them. Fails if a request fails or if an item is not in the catalogue
of the version that its answer names. Prints a record as JSON: throughput, latencies in ms, and the
server's resident memory before and after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onerec import OneRec, OneRecConfig
from onerec.inference.exported import export
from onerec.tokenizer import Catalog

TOKEN, K, CATALOGUES = "load", 256, 3


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded answer."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self.connection.getresponse()
        text = response.read()
        found = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if found else text.decode()


def make_folders(root: Path, items: int) -> list[Path]:
    """An export, and catalogues for the same network with other items."""
    torch.manual_seed(0)
    config = OneRecConfig.preset("tiny", codebook_size=K, init_std=0.1)
    folders = []
    for number in range(CATALOGUES):
        sids = np.random.default_rng(number).integers(0, K, (items, 3))
        catalog = Catalog.build(np.arange(items) + number * items, sids, K)
        folders.append(root / str(number))
        if number == 0:
            export(OneRec(config).eval(), catalog, folders[0])
        else:
            catalog.save(folders[-1])
    return folders


def start(folder: Path, arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A server that is ready, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "onerec", "serve", str(folder), "--port", str(port), *arguments],
        env={**os.environ, "ONEREC_TOKEN": TOKEN},
        stderr=subprocess.DEVNULL,
    )
    while True:
        try:
            if Client(port).send("GET", "/readyz")[0] == 200:
                return process, port
        except ConnectionError:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}") from None
            time.sleep(0.05)


def resident_mib(process: subprocess.Popen[bytes]) -> float:
    """Memory of a process that is not shared with files."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no RssAnon in /proc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--items", type=int, default=20_000, help="of a catalogue")
    parser.add_argument("--beam-width", type=int, default=16)
    parser.add_argument("--session-length", type=int, default=2)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        folders = make_folders(Path(root), options.items)
        process, port = start(folders[0], ["--max_queue", str(4 * options.clients)])
        catalogue_of = {1: 0}
        answers: list[tuple[int, Any, float]] = []
        left = iter(range(options.requests))
        lock = threading.Lock()

        def work(seed: int) -> None:
            client, draw = Client(port), np.random.default_rng(seed)
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                history = draw.integers(0, CATALOGUES * options.items, draw.integers(0, 60))
                body = {
                    "history": history.tolist(),
                    "beam_width": options.beam_width,
                    "session_length": options.session_length,
                    "deadline_ms": 60_000,
                }
                begin = time.perf_counter()
                status, got = client.send("POST", "/v1/recommend", body)
                answers.append((status, got, time.perf_counter() - begin))

        before = resident_mib(process)
        begin = time.perf_counter()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(options.clients)]
        for thread in threads:
            thread.start()
        admin = Client(port)
        for number in range(options.swaps):
            while len(answers) < number * options.requests / (options.swaps + 1):
                time.sleep(0.005)
            which = (number + 1) % CATALOGUES
            status, got = admin.send("POST", "/admin/swap", {"folder": str(folders[which])})
            if status != 200:
                raise SystemExit(f"swap {number}: {status} {got}")
            catalogue_of[got["version"]] = which
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        after = resident_mib(process)
        metrics = admin.send("GET", "/metrics")[1]
        process.send_signal(signal.SIGTERM)
        code = process.wait()

    failed = [(status, got) for status, got, _ in answers if status != 200]
    foreign = 0
    for status, got, _ in answers:
        if status == 200:
            first = catalogue_of[got["version"]] * options.items
            given = [item for session in got["sessions"] for item in session["items"]]
            foreign += sum(not first <= item < first + options.items for item in given)
            foreign += len(given) != options.session_length
    times = np.array([taken for *_, taken in answers]) * 1000
    record = {
        "requests": len(answers),
        "failed": len(failed),
        "items of another version": foreign,
        "swaps": options.swaps,
        "versions that answered": len({got["version"] for s, got, _ in answers if s == 200}),
        "requests_per_second": round(len(answers) / seconds, 1),
        **{f"p{p}_ms": round(float(np.percentile(times, p)), 2) for p in (50, 99, 99.9)},
        "server_mib_before": round(before, 1),
        "server_mib_after": round(after, 1),
        "illegal_by_its_own_count": float(
            re.findall(r"^onerec_items_illegal_total (\S+)", metrics, re.M)[0]
        ),
        "exit_code": code,
    }
    print(json.dumps(record, indent=1))
    if failed or foreign or code or len(answers) != options.requests:
        raise SystemExit(f"failed: {failed[:3]}")


if __name__ == "__main__":
    main()
