"""Load on `onerec serve` over loopback; every answer is checked. Prints a record as JSON.

    python benchmarks/load_serving.py swaps --requests 10000 --swaps 50 --clients 8
    python benchmarks/load_serving.py load --seconds 60
    python benchmarks/load_serving.py steady --minutes 20 --rate 20

All make a network with random weights and a catalogue. `swaps` changes among catalogues with
disjoint items and fails if a request fails or if an item is not in the catalogue of the version
that its answer names. `load` measures what a request takes besides the engine's call, which the
answer tells, and for the same client a bare uvicorn that answers at once; closed loops of 1 to 8
clients,
and open loops (arrivals at random times, latency counted from the time of arrival) at shares of the
throughput that the closed loops reached. `steady` samples the server's memory. The last two keep
their records in benchmarks/results/serving; `make docs` shows them.

Clients and server share the machine; the engine has one thread.
"""

from __future__ import annotations

import argparse
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

from onerec import OneRec, OneRecConfig, Recommender
from onerec.environment import collect
from onerec.inference.exported import export
from onerec.tokenizer import Catalog

TOKEN, K, CATALOGUES = "load", 256, 3
RESULTS = Path(__file__).resolve().parent / "results" / "serving"


class Client:
    """One connection that is kept open; a bare socket, for the client shares the machine."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.left = b""
        self.engine = 0.0  # seconds of the engine in the last answer

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded answer."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + data)
        while b"\r\n\r\n" not in self.left:
            self._more()
        top, _, text = self.left.partition(b"\r\n\r\n")
        (length,) = re.findall(rb"content-length: (\d+)", top.lower())
        while len(text) < int(length):
            self.left = b""
            self._more()
            text += self.left
        self.left = text[int(length) :]
        if timing := re.search(rb"engine;dur=([\d.]+)", top):
            self.engine = float(timing[1]) / 1000
        text = text[: int(length)]
        found = b"application/json" in top
        return int(top.split()[1]), json.loads(text) if found else text.decode()

    def _more(self) -> None:
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        self.left += got


def make_folders(root: Path, items: int) -> list[Path]:
    """An export, and catalogues for the same network with other items."""
    torch.manual_seed(0)
    config = OneRecConfig.preset("paper-tiny", codebook_size=K, init_std=0.1)
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
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "onerec", "serve", str(folder), "--port", str(port), *arguments],
        env={**os.environ, "ONEREC_ADMIN_TOKEN": TOKEN},
        stderr=subprocess.DEVNULL,
    )
    wait_for(process, port, "/readyz")
    return process, port


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], port: int, path: str) -> None:
    while True:
        try:
            if Client(port).send("GET", path)[0] == 200:
                return
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


def body_of(options: argparse.Namespace, draw: np.random.Generator, items: int) -> dict[str, Any]:
    """A request with a history of random length."""
    return {
        "history": draw.integers(0, items, draw.integers(0, 60)).tolist(),
        "beam_width": options.beam_width,
        "session_length": options.session_length,
        "deadline_ms": 60_000,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(1000 * float(np.percentile(seconds, p)), 2) for p in (50, 99, 99.9)}


def closed(port: int, options: argparse.Namespace, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they have an answer."""
    times: list[float] = []
    engine: list[float] = []
    failed: list[int] = []
    end = time.perf_counter() + seconds

    def work(seed: int) -> None:
        client, draw = Client(port), np.random.default_rng(seed)
        while time.perf_counter() < end:
            body = body_of(options, draw, options.items)
            begin = time.perf_counter()
            status, _ = client.send("POST", "/v1/recommend", body)
            times.append(time.perf_counter() - begin)
            engine.append(client.engine)
            if status != 200:
                failed.append(status)

    in_threads(clients, work)
    rate = round(len(times) / seconds, 1)
    return {
        "clients": clients,
        "per_second": rate,
        "failed": len(failed),
        **percentiles(times),
        "engine": percentiles(engine),
        "besides the engine": percentiles([a - b for a, b in zip(times, engine, strict=True)]),
    }


BARE = """
import sys, uvicorn
try:
    from onerec.serving.protocol import http_protocol
    http = http_protocol()
except ImportError:
    http = "auto"

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    length = [(b"content-length", b"2"), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": b"{}"})

uvicorn.run(app, port=int(sys.argv[1]), http=http, lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False)
"""


def bare(options: argparse.Namespace, seconds: float) -> dict[str, float]:
    """What the client waits for an answer that costs nothing."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", BARE, str(port)])
    wait_for(process, port, "/")
    times = closed(port, options, 1, seconds)
    process.terminate()
    process.wait()
    return {name: value for name, value in times.items() if name.endswith("_ms")}


def open_loop(
    port: int, options: argparse.Namespace, rate: float, seconds: float
) -> dict[str, Any]:
    """Arrivals at random times, whether or not the ones before have an answer."""
    draw = np.random.default_rng(0)
    at = np.cumsum(draw.exponential(1 / rate, size=int(rate * seconds)))
    bodies = [body_of(options, draw, options.items) for _ in at]
    order = iter(range(len(at)))
    lock = threading.Lock()
    times: list[float] = []
    statuses: list[int] = []
    begin = time.perf_counter() + 0.2

    def work(_: int) -> None:
        client = Client(port)
        while True:
            with lock:
                number = next(order, None)
            if number is None:
                return
            due = begin + at[number]
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                status, _ = client.send("POST", "/v1/recommend", bodies[number])
            except ConnectionError:  # idle for too long: as HTTP clients do, once
                client = Client(port)
                status, _ = client.send("POST", "/v1/recommend", bodies[number])
            statuses.append(status)
            times.append(time.perf_counter() - due)

    in_threads(32, work)
    return {
        "offered_per_second": round(rate, 1),
        "per_second": round(len(times) / (time.perf_counter() - begin), 1),
        "failed": sum(status not in (200, 429) for status in statuses),
        "refused": statuses.count(429),
        **percentiles(times),
    }


def in_threads(count: int, work: Any) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Overhead, closed and open loops."""
    with tempfile.TemporaryDirectory() as root:
        folder = make_folders(Path(root), options.items)[0]
        recommender = Recommender.from_exported(folder, num_threads=1)
        draw = np.random.default_rng(0)
        alone = []
        for _ in range(150):
            body = body_of(options, draw, options.items)
            begin = time.perf_counter()
            recommender.recommend(
                [body["history"]],
                beam_width=options.beam_width,
                session_length=options.session_length,
            )
            alone.append(time.perf_counter() - begin)
        process, port = start(folder, ["--num_threads", "1"])
        part = options.seconds / 4
        closed(port, options, 1, 1.0)
        record: dict[str, Any] = {
            "engine alone": percentiles(alone),
            "bare": bare(options, 2.0),
            "closed": [closed(port, options, clients, part) for clients in (1, 2, 4, 8)],
        }
        best = max(row["per_second"] for row in record["closed"])
        record["open"] = [open_loop(port, options, best * x, part) for x in (0.3, 0.5, 0.7, 0.9)]
        process.send_signal(signal.SIGTERM)
        record["exit_code"] = process.wait()
    if record["exit_code"] or any(row["failed"] for row in record["closed"] + record["open"]):
        raise SystemExit(f"failed: {record}")
    return record


def steady(options: argparse.Namespace) -> dict[str, Any]:
    """Memory of the server, every half minute, at a steady rate."""
    with tempfile.TemporaryDirectory() as root:
        process, port = start(make_folders(Path(root), options.items)[0], ["--num_threads", "1"])
        open_loop(port, options, options.rate, 20)
        memory, failed = [round(resident_mib(process), 1)], 0
        for _ in range(round(2 * options.minutes)):
            failed += open_loop(port, options, options.rate, 30)["failed"]
            memory.append(round(resident_mib(process), 1))
        process.send_signal(signal.SIGTERM)
        process.wait()
    if failed:
        raise SystemExit(f"{failed} requests failed")
    return {"minutes": options.minutes, "per_second": options.rate, "memory_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("swaps", "load", "steady"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all closed or open loops")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--items", type=int, default=20_000, help="of a catalogue")
    parser.add_argument("--beam-width", type=int, default=16)
    parser.add_argument("--session-length", type=int, default=2)
    options = parser.parse_args()
    if options.mode == "swaps":
        return swaps(options)
    torch.set_num_threads(1)
    record = {
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{name: getattr(options, name) for name in ("items", "beam_width", "session_length")},
        **{"load": load, "steady": steady}[options.mode](options),
    }
    print(json.dumps(record, indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.mode}.json").write_text(json.dumps(record, indent=1) + "\n")


def environment() -> dict[str, Any]:
    found = collect()
    return {
        "onerec": found["onerec"],
        "cpu": found["cpu"]["name"],
        "cores": found["cpu"]["usable_cores"],
    }


def swaps(options: argparse.Namespace) -> None:
    """Requests while the catalogue changes."""
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
                body = body_of(options, draw, CATALOGUES * options.items)
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
    record = {
        "requests": len(answers),
        "failed": len(failed),
        "items of another version": foreign,
        "swaps": options.swaps,
        "versions that answered": len({got["version"] for s, got, _ in answers if s == 200}),
        "requests_per_second": round(len(answers) / seconds, 1),
        **percentiles([taken for *_, taken in answers]),
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
