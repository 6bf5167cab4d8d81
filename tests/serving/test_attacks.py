"""Attacks on the server: each is bounded, and an honest request is answered beside it."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')
pytest.importorskip("uvicorn", reason='needs the extra "serve"')

from serving_helpers import (
    TOKEN,
    K,
    Server,
    Slow,
    make_catalog,
    run_command,
)

from onerec import OneRec, OneRecConfig, Recommender
from onerec.errors import DataError
from onerec.inference import exported
from onerec.inference.exported import export
from onerec.serving.config import ServeConfig
from onerec.serving.queue import FairQueue, Job, Options, Pace, QueueFull
from onerec.serving.versions import Draining, SwapUnderWay, Versions
from onerec.tokenizer import Catalog

LONG = 120  # seconds: against a hang alone
CONFIG = ServeConfig(
    beam_width=8,
    max_beam_width=64,
    num_threads=1,
    max_head_bytes=4096,
    head_seconds=3,
    body_seconds=3,
    idle_seconds=30,
    max_connections=40,
    deadline_ms=60_000,
)


def network(seed: int = 0) -> OneRec:
    torch.manual_seed(seed)
    return OneRec(
        OneRecConfig.preset("paper-tiny", codebook_size=K, session_length=3, init_std=0.3)
    ).eval()


@pytest.fixture(scope="module")
def model() -> OneRec:
    return network()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: OneRec) -> Path:
    path = tmp_path_factory.mktemp("attacks") / "good"
    export(model, make_catalog(0, 0), path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = Server(Recommender.from_exported(folder, num_threads=1), CONFIG, TOKEN)
    yield running
    running.stop()


def swap(server: Server, path: Path, **rest: Any) -> tuple[int, str]:
    status, got, _ = server.send("POST", "/admin/swap", {"folder": str(path), **rest})
    return status, got.get("error", "")


def honest(server: Server) -> None:
    """A small request of somebody else is answered."""
    status, got, _ = server.send("POST", "/v1/recommend", {"history": [3], "beam_width": 4})
    assert status == 200, got
    assert got["sessions"]


def metric(server: Server, name: str) -> float:
    text = server.send("GET", "/metrics", token=None)[1]
    found = re.findall(rf"^{re.escape(name)} ([0-9.e+-]+)$", text, re.M)
    return float(found[0]) if found else 0.0


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=LONG)


def ended(one: socket.socket) -> bytes:
    """What a connection brings until the server closes it."""
    got = b""
    try:
        while data := one.recv(1 << 16):
            got += data
    except ConnectionResetError:
        pass
    return got


# --- Swaps


@pytest.mark.parametrize("name", ["engine.bin", "trie.bin", "catalog.parquet", "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_is_refused_and_wedges_nothing(
    server: Server, folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / name).unlink()
    if kind == "fifo":
        os.mkfifo(bad / name)
    elif kind == "folder":
        (bad / name).mkdir()
    else:
        (bad / name).symlink_to("/dev/zero")
    status, error = swap(server, bad)
    assert (status, name in error) == (422, True), error
    assert swap(server, folder)[0] == 200
    assert server.send("POST", "/admin/rollback")[0] == 200
    honest(server)


@pytest.mark.parametrize("name", ["trie.bin", "catalog.parquet"])
def test_a_fifo_in_a_catalogue_alone_is_refused(
    server: Server, folder: Path, tmp_path: Path, name: str
) -> None:
    for part in {"trie.bin", "catalog.parquet"} - {name}:
        shutil.copy(folder / part, tmp_path)
    os.mkfifo(tmp_path / name)
    status, error = swap(server, tmp_path)
    assert (status, name in error) == (422, True), error


class Hanging:
    """Loading that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        load = Recommender.from_exported

        def slow(path: str | Path, **options: Any) -> Recommender:
            if Path(path).name == "slow":
                self.entered.set()
                self.go.wait(LONG)
                path = Path(path).parent / "good"
            return load(path, **options)

        monkeypatch.setattr(Recommender, "from_exported", slow)


def slow_folder(folder: Path) -> Path:
    slow = folder.parent / "slow"
    if not slow.exists():
        shutil.copytree(folder, slow)
    return slow


def test_while_a_swap_loads_another_is_refused_and_a_rollback_is_done_at_once(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(monkeypatch)
    got: list[tuple[int, str]] = []
    first = threading.Thread(target=lambda: got.append(swap(server, slow_folder(folder))))
    assert swap(server, folder)[0] == 200
    first.start()
    assert hanging.entered.wait(LONG)
    assert swap(server, folder) == (409, "another swap is under way")
    honest(server)
    before = server.send("GET", "/v1/version")[1]["version"]
    assert server.send("POST", "/admin/rollback")[1]["version"] == before + 1
    first.join(LONG)
    assert got == [(409, "a rollback came before the folder was loaded")]
    hanging.go.set()
    assert swap(server, folder)[0] == 200
    assert server.send("GET", "/v1/version")[1]["version"] == before + 2


def test_a_swap_that_takes_too_long_is_given_up_and_the_next_one_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(monkeypatch)
    slow = slow_folder(folder)

    async def run() -> None:
        config = ServeConfig(swap_seconds=0.2)
        versions = Versions(Recommender.from_exported(folder), "", config)
        with pytest.raises(DataError, match=r"not loaded after 0\.2 seconds"):
            await versions.swap(slow)
        versions._config = ServeConfig()
        assert (await versions.swap(folder)).number == 2
        hanging.go.set()  # what the first one finds now is nobody's any more
        task = asyncio.ensure_future(versions.swap(slow))
        await asyncio.sleep(0)
        with pytest.raises(SwapUnderWay):
            await versions.swap(folder)
        assert (await task).number == 3
        hanging.go.clear()
        task = asyncio.ensure_future(versions.swap(slow))
        await asyncio.sleep(0)
        versions.close()
        with pytest.raises(Draining):
            await task
        assert versions.now.number == 3

    asyncio.run(asyncio.wait_for(run(), LONG))
    hanging.go.set()


def test_sigterm_ends_a_process_whose_swap_hangs(folder: Path, tmp_path: Path) -> None:
    # Only what a file system does can hang the loader now; so the loader itself is made to wait.
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, time\nimport onerec.serving.versions as v\n"
        f"def hang(*_): pathlib.Path({str(tmp_path / 'entered')!r}).touch(), time.sleep(3600)\n"
        "v.Versions._checked = hang\n"
    )
    process, client = run_command(folder, PYTHONPATH=str(tmp_path))
    asking = threading.Thread(target=lambda: swap(client, folder))
    asking.start()
    while not (tmp_path / "entered").exists():
        time.sleep(0.01)
    assert client.send("POST", "/admin/rollback")[0] == 422  # there is none, and it does not wait
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    asking.join(LONG)
    lines = [json.loads(line) for line in errors.splitlines()]
    (audit,) = (x for x in lines if x.get("action") == "swap" and x["status"] == 503)
    assert audit["folder"] == str(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder_layers": 4096, "decoder_layers": 4096, "n_experts": 65536},
        {"encoder_layers": 2**31 - 1},
        {"d_model": 1 << 20, "n_heads": 1},
        {"n_items": 2**31 - 1},
        {"history_length": 10**30},
        {"d_ff": 1e308},
        {"n_heads": 2.5},
        {"levels": True},
        {"normalize_gates": None},
        {"norm_eps": float("inf")},
        {"session_length": []},
    ],
    ids=str,
)
def test_absurd_sizes_in_a_config_are_refused_before_any_work(
    folder: Path, tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    fields = json.loads((bad / "config.json").read_text()) | changed
    (bad / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(exported.NativeModel, "load", None)  # it is not even asked
    with pytest.raises(DataError):
        Recommender.from_exported(bad)


def test_a_model_of_absurd_size_is_refused_by_the_size_of_its_file(
    model: OneRec, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"encoder_layers": 4096}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="wanted at least"):
        OneRec.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "codes.weight",
        "decoder.0.attention.qkv.weight",
        "decoder.1.ffn.router",
        "decoder_norm.weight",
    ],
)
def test_weights_that_are_not_finite_are_refused_by_all(
    model: OneRec, tmp_path: Path, name: str, value: float
) -> None:
    bad = copy.deepcopy(model)
    dict(bad.named_parameters())[name].data.view(-1)[-1] = value
    catalog = make_catalog(0, 0)
    calls = [
        lambda: export(bad, catalog, tmp_path / "e"),
        lambda: Recommender(bad, catalog),
        lambda: Recommender(bad, catalog, backend="native"),
    ]
    for call in calls:
        with pytest.raises(DataError, match=re.escape(name)):
            call()
    assert not (tmp_path / "e").exists()


def test_what_serves_nothing_or_the_wrong_thing_is_refused(
    server: Server, folder: Path, model: OneRec, tmp_path: Path
) -> None:
    sids = make_catalog(0, 0).sids
    Catalog.build([], np.empty((0, 3), np.int32), K).save(tmp_path / "empty")
    Catalog.build(["only"], sids[:1], K).save(tmp_path / "text")
    Catalog.build(list(range(29)), sids[:29], K).save(tmp_path / "few")
    Catalog.build(list(range(30)), sids[:30], K).save(tmp_path / "half")
    Catalog.build([f"v{i}" for i in range(60)], sids, K).save(tmp_path / "words")
    with pytest.raises(DataError, match="wanted items"):
        export(model, Catalog.load(tmp_path / "empty"), tmp_path / "x")
    swap(server, folder)
    before = server.send("GET", "/v1/version")[1]
    assert "wanted items" in swap(server, tmp_path / "empty")[1]
    assert "wanted items" in swap(server, tmp_path / "empty", force=True)[1]
    assert "wanted integers as in the catalogue" in swap(server, tmp_path / "words")[1]
    assert "wanted integers as in the catalogue" in swap(server, tmp_path / "text")[1]
    status, error = swap(server, tmp_path / "few")
    assert status == 422
    assert "wanted at least 30 (0.5 of the 60 being served), got 29" in error
    assert server.send("GET", "/v1/version")[1] == before
    assert swap(server, tmp_path / "half")[0] == 200
    assert swap(server, folder)[0] == 200
    assert swap(server, tmp_path / "few", force=True)[0] == 200
    assert swap(server, tmp_path / "words", force=True)[0] == 200
    assert swap(server, folder, force=True)[0] == 200
    honest(server)


def test_a_model_that_finds_nothing_is_not_served(folder: Path) -> None:
    class Blind(Recommender):
        def recommend(self, histories: Any, **options: Any) -> Any:
            found = super().recommend(histories, **options)
            for one in found[1:]:
                one.item_ids.clear()
            return found

    with pytest.raises(DataError, match="a full history, got none"):
        Blind.from_exported(folder).warmup(beam_width=4)


def test_parts_of_two_exports_are_refused(server: Server, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    export(network(1), make_catalog(1, 0), other)  # of the same shape and the same item ids
    swap(server, folder, force=True)
    parts = ["engine.bin", "trie.bin", "catalog.parquet", "catalog.bin", "config.json"]
    for name in parts:
        mixed = shutil.copytree(folder, tmp_path / f"mixed-{name}")
        shutil.copy(other / name, mixed)
        status, error = swap(server, mixed, force=True)
        assert status == 422, name
        assert str(mixed) in error
    both = shutil.copytree(folder, tmp_path / "both")
    for name in ("trie.bin", "catalog.parquet", "catalog.bin"):
        shutil.copy(other / name, both)
    assert "wanted the file that was exported" in swap(server, both)[1]
    now = server.send("GET", "/v1/version")[1]
    assert now["export"] == json.loads((folder / "config.json").read_text())["lineage"]["export"]
    assert re.fullmatch("[0-9a-f]{32}", now["export"])
    served = f'arm="a",export="{now["export"]}",quantizer="",version="{now["version"]}"'
    assert metric(server, f"onerec_served{{{served}}}") == 1


def test_a_catalogue_of_another_quantizer_is_refused(model: OneRec, tmp_path: Path) -> None:
    sids, ids = make_catalog(0, 0).sids, list(range(60))
    for name in ("mine", "other", ""):
        Catalog.build(ids, sids, K, quantizer=name).save(tmp_path / f"c{name}")
    export(model, Catalog.load(tmp_path / "cmine"), tmp_path / "e")
    running = Server(Recommender.from_exported(tmp_path / "e"), CONFIG, TOKEN)
    assert running.send("GET", "/v1/version")[1]["quantizer"] == "mine"
    assert (
        "quantizer: wanted mine as in the catalogue being" in swap(running, tmp_path / "cother")[1]
    )
    assert "got none" in swap(running, tmp_path / "c")[1]
    assert swap(running, tmp_path / "cmine")[0] == 200
    assert swap(running, tmp_path / "cother", force=True)[0] == 200
    running.stop()


# --- Connections


def test_a_head_without_an_end_is_cut_off(server: Server) -> None:
    before = metric(server, 'onerec_connections_closed_total{limit="head"}')
    for head in (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 10_000,
        b"GET /" + b"a" * 10_000,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 2_000,
    ):
        one = connect(server)
        with one:
            one.sendall(head)
            got = ended(one)
        assert got == b"" or got.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), got
        honest(server)
    assert metric(server, 'onerec_connections_closed_total{limit="head"}') > before


def test_half_heads_half_bodies_and_silence_are_cut_off(server: Server) -> None:
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    kinds = {
        "silent": b"",
        "half a head": head + b"X: ",
        "half a body": head + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        "a chunk without an end": head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    }
    held = [(name, connect(server)) for name in kinds for _ in range(5)]
    for name, one in held:
        one.sendall(kinds[name])
    honest(server)
    for name, one in held:
        got = ended(one)
        assert got == b"" or got.startswith((b"HTTP/1.1 408", b"HTTP/1.1 422")), (name, got)
        one.close()
    honest(server)


def test_a_drip_of_bytes_does_not_keep_a_head_open(server: Server) -> None:
    one = connect(server)
    one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")

    def drip() -> None:
        for _ in range(4 * LONG):  # less than the limit of bytes
            one.sendall(b"a")
            time.sleep(0.25)

    with pytest.raises(ConnectionError):
        drip()
    one.close()


def test_more_idle_connections_than_may_be_open_shut_nobody_out(server: Server) -> None:
    held = [connect(server) for _ in range(3 * CONFIG.max_connections)]
    for _ in range(5):
        honest(server)
    assert metric(server, "onerec_connections") <= CONFIG.max_connections
    assert metric(server, 'onerec_connections_closed_total{limit="connections"}') > 0
    for one in held:
        one.close()


def test_the_limit_of_open_files_is_heeded_and_told(folder: Path) -> None:
    process, client = run_command(folder, limit=160)
    held = [connect(client) for _ in range(300)]
    honest(client)
    for one in held:
        one.close()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LONG)
    lines = [json.loads(line) for line in errors.splitlines()]
    told = [x for x in lines if x["message"] == "connections closed at a limit"]
    assert told
    assert told[0]["limit"] == "connections"


def test_requests_that_are_sent_one_after_the_other_without_waiting_are_answered(
    server: Server,
) -> None:
    one = connect(server)
    one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
    got = b""
    while got.count(b"HTTP/1.1 200") < 400:
        data = one.recv(1 << 16)
        assert data, got[-300:]
        got += data
    one.close()


def test_answers_that_nobody_reads_are_cut_off(server: Server) -> None:
    held = [connect(server) for _ in range(3)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(0.5)
        try:
            for _ in range(200):
                one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        except (TimeoutError, ConnectionError):
            pass
    honest(server)

    def go_on(one: socket.socket) -> None:
        one.settimeout(LONG)
        for _ in range(5 * LONG):
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.2)

    for one in held:  # closed by the server, although nothing has been read
        with pytest.raises(ConnectionError):
            go_on(one)
        one.close()


# --- The queue


def job(client: str, width: int, *, deadline: float = 1e9, temperature: float = 1.0) -> Job:
    options = Options(None, width, 1, True, None, None, temperature)
    return Job([], [], options, client, width * 9, 0.0, deadline, None)  # type: ignore[arg-type]


def order(queue: FairQueue) -> list[Job]:
    taken = []
    while len(queue):
        batch, late = queue.take(0.0, 64, Pace())
        taken += batch
        assert not late
    return taken


def test_a_small_request_waits_for_the_call_under_way_alone() -> None:
    queue = FairQueue(100, 100_000)
    wide = [job("x", 64, temperature=1 + i / 1000) for i in range(20)]
    for one in wide:
        queue.push(one)
    assert queue.take(0.0, 64, Pace())[0] == wide[:1]
    small = job("x", 4)  # even of the same client
    queue.push(small)
    assert order(queue) == [small, *wide[1:]]


def test_clients_have_equal_shares() -> None:
    queue = FairQueue(100, 100_000)
    greedy = [job("x", 64, temperature=1 + i / 1000) for i in range(10)]
    modest = [job("y", 64, temperature=2 + i / 1000) for i in range(3)]
    for one in (*greedy, *modest):
        queue.push(one)
    taken = order(queue)
    assert [taken.index(one) for one in modest] == [1, 3, 5]
    assert [one for one in taken if one in greedy] == greedy


def test_the_budget_is_one_of_beams_and_the_greediest_pays() -> None:
    queue = FairQueue(100, 256)
    greedy = [job("x", 64) for _ in range(4)]
    for one in greedy:
        assert queue.push(one) == []
    with pytest.raises(QueueFull):
        queue.push(job("x", 1))
    assert queue.push(job("y", 64)) == [greedy[-1]]
    assert queue.push(job("z", 64)) == [greedy[2]]
    with pytest.raises(QueueFull):
        queue.push(job("y", 64))
    assert queue.rows == 256
    lone = FairQueue(100, 8)
    assert lone.push(job("x", 64)) == []  # more than the budget, but there is nobody else


def test_what_cannot_be_answered_in_time_is_not_begun_and_a_wrong_guess_heals() -> None:
    pace = Pace()
    assert pace.expected(100) == 0.0
    pace.note(64 * 9, 10.0)
    queue = FairQueue(100, 1000)
    soon, later = job("x", 64, deadline=9.0), job("x", 64, deadline=30.0)
    for one in (soon, later):
        queue.push(one)
    assert queue.take(0.0, 64, pace) == ([later], [soon])
    assert pace.expected(64 * 9) == pytest.approx(9.0)
    # Two together would take longer than the deadline of one of them.
    for one in (later, tight := job("y", 64, deadline=12.0)):
        queue.push(one)
    assert queue.take(0.0, 128, pace) == ([later], [])
    assert list(queue) == [tight]


def test_wide_beams_of_one_address_leave_the_small_request_in_time(
    folder: Path,
) -> None:
    slow = Slow(Recommender.from_exported(folder, num_threads=1))
    config = ServeConfig(beam_width=8, max_beam_width=64, max_rows=64, deadline_ms=60_000)
    running = Server(slow, config, TOKEN)  # type: ignore[arg-type]
    done: list[str] = []

    def ask(name: str, body: dict[str, Any]) -> None:
        assert running.send("POST", "/v1/recommend", body)[0] == 200
        done.append(name)

    def start(name: str, **body: Any) -> threading.Thread:
        one = threading.Thread(target=ask, args=(name, {"history": [3], **body}))
        one.start()
        return one

    threads = [start("wide", beam_width=64, temperature=1 + i / 1000) for i in range(12)]
    while metric(running, "onerec_queue_length") < 11:
        time.sleep(0.01)
    threads.append(start("small", beam_width=4))
    while metric(running, "onerec_queue_length") < 12:
        time.sleep(0.01)
    slow.go.set()
    for one in threads:
        one.join(LONG)
    # The first call was under way; threads tell of their answers in about the order of them.
    assert done.index("small") <= 4, done
    assert len(done) == 13
    running.stop()


def test_requests_whose_client_has_left_cost_nothing(folder: Path) -> None:
    slow = Slow(Recommender.from_exported(folder, num_threads=1))
    config = ServeConfig(beam_width=8, max_queue=4, deadline_ms=60_000)
    running = Server(slow, config, TOKEN)  # type: ignore[arg-type]
    body = json.dumps({"history": [3]}).encode()
    whole = (
        f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    first = connect(running)
    first.sendall(whole)
    assert slow.entered.wait(LONG)
    for round_ in range(5):
        gone = [connect(running) for _ in range(4)]
        for one in gone:
            one.sendall(whole)
        while metric(running, "onerec_queue_length") < 4:
            time.sleep(0.01)
        for one in gone:
            one.close()
        while metric(running, "onerec_queue_length") > 0:
            time.sleep(0.01)
        assert metric(running, "onerec_abandoned_total") == 4 * (round_ + 1)
    first.close()
    slow.go.set()
    honest(running)
    assert len(slow.batches) == 2  # the first and the honest one
    told = 'onerec_requests_total{path="/v1/recommend",status="499"}'
    while metric(running, told) < 20:
        time.sleep(0.01)
    running.stop()


def test_an_engine_without_progress_is_not_ready(folder: Path) -> None:
    slow = Slow(Recommender.from_exported(folder, num_threads=1))
    config = ServeConfig(beam_width=8, stall_seconds=0.05, deadline_ms=60_000)
    running = Server(slow, config, TOKEN)  # type: ignore[arg-type]
    assert running.send("GET", "/readyz")[0] == 200
    asking = threading.Thread(target=honest, args=(running,))
    asking.start()
    while running.send("GET", "/readyz")[0] == 200:
        time.sleep(0.01)
    assert running.send("GET", "/readyz")[0] == 503
    slow.go.set()
    asking.join(LONG)
    assert running.send("GET", "/readyz")[0] == 200
    running.stop()


def test_answers_without_an_item_are_counted(server: Server) -> None:
    swapped = server.send("GET", "/v1/version")[1]["items"]
    before = metric(server, 'onerec_empty_answers_total{arm="a"}')
    everything = list(range(swapped))
    status, got, _ = server.send("POST", "/v1/recommend", {"history": [], "exclude": everything})
    assert (status, got["sessions"]) == (200, [])
    assert metric(server, 'onerec_empty_answers_total{arm="a"}') == before + 1


# --- Keys


def test_the_clients_token_changes_nothing_and_several_are_valid(folder: Path) -> None:
    running = Server(
        Recommender.from_exported(folder, num_threads=1),
        ServeConfig(beam_width=8, exports=str(folder.parent)),
        "old,new",
        admin_token="root,next",
    )
    body = {"folder": str(folder)}
    for token in ("old", "new"):
        assert running.send("POST", "/v1/recommend", {"history": []}, token)[0] == 200
        for path in ("/admin/swap", "/admin/rollback"):
            status, got, _ = running.send("POST", path, body, token)
            assert (status, got["error"]) == (403, "wanted the admin's token")
    for token in (None, "old,new", "root,next", "ol", "oldd", "", "Old"):
        assert running.send("POST", "/v1/recommend", {"history": []}, token)[0] == 401
        assert running.send("POST", "/admin/swap", body, token)[0] == 401
    for token in ("root", "next"):
        assert running.send("POST", "/admin/swap", body, token)[0] == 200
        assert running.send("POST", "/v1/recommend", {"history": []}, token)[0] == 200
    for scheme in ("bearer", "BEARER", "Bearer "):
        given = {"Authorization": f"{scheme} new"}
        assert running.send("POST", "/v1/recommend", {"history": []}, None, **given)[0] == 200
    given = {"Authorization": "Basic bmV3"}
    assert running.send("POST", "/v1/recommend", {"history": []}, None, **given)[0] == 401
    running.stop()


def test_a_swap_takes_folders_below_exports_alone(
    folder: Path, tmp_path: Path, model: OneRec, caplog: pytest.LogCaptureFixture
) -> None:
    inside, outside = tmp_path / "exports", tmp_path / "outside"
    export(model, make_catalog(0, 0), inside / "one")
    export(model, make_catalog(0, 0), outside)
    (inside / "link").symlink_to(outside)
    (inside / "within").symlink_to(inside / "one")
    config = ServeConfig(beam_width=8, exports=str(inside))
    running = Server(Recommender.from_exported(folder, num_threads=1), config, TOKEN)
    wrong = [outside, inside, inside / "one/../../outside", inside / "link", Path("/"), Path("one")]
    for path in [*wrong, inside / "../exports-two", tmp_path / "none"]:
        status, error = swap(running, path)
        assert (status, "wanted a folder below" in error) == (422, True), (path, error)
    with caplog.at_level(logging.INFO, "onerec.serving"):
        for path in (inside / "one", inside / "within", inside / "../exports/one"):
            assert swap(running, path)[0] == 200
    now = running.send("GET", "/v1/version")[1]
    told = [r.fields for r in caplog.records if r.message == "admin"]
    assert [line["status"] for line in told if line["folder"] == str(outside)] == [422]
    lines = [line for line in told if line["status"] == 200]
    assert len(lines) == 3
    assert lines[-1]["folder"] == str(inside / "../exports/one")
    assert lines[-1]["client"] == "127.0.0.1"
    for name in ("version", "export", "catalog", "items"):
        assert lines[-1][name] == now[name]
    running.stop()


def test_the_pages_are_reachable_with_a_token_and_load_nothing(server: Server) -> None:
    for path in ("/docs", "/openapi.json"):
        status, _, headers = server.send("GET", path, token=None)
        assert status == 401
        assert headers["www-authenticate"] == 'Basic realm="onerec", Bearer'
        given = {"Authorization": "Basic YW55Ym9keTpzZXNhbWU="}  # anybody:sesame
        assert server.send("GET", path, token=None, **given)[0] == 200
    text = server.send("GET", "/docs")[1]
    assert "POST /v1/recommend/batch" in text
    assert "beam_width" in text
    assert not re.search(r"https?://|<script|<link|src=", text)
    schema = server.send("GET", "/openapi.json")[1]
    assert set(schema["components"]["securitySchemes"]) == {"token", "admin"}
    assert schema["paths"]["/admin/swap"]["post"]["security"] == [{"admin": []}]
    assert {"token": []} in schema["paths"]["/v1/rank"]["post"]["security"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"history": [], "beam_width": True}, "beam_width"),
        ({"history": [], "beam_width": "7"}, "beam_width"),
        ({"history": [], "exclude_history": "yes"}, "exclude_history"),
        ({"history": [1.5]}, "history.0:"),
        (b'{"history": [], "beam_width": 1e30}', "beam_width"),
    ],
)
def test_values_of_another_type_are_refused_by_the_fields_name(
    server: Server, body: Any, words: str
) -> None:
    status, got, _ = server.send("POST", "/v1/recommend", body)
    assert (status, words in got["error"]) == (422, True), got
    assert "[" not in got["error"]


def test_compressed_bodies_and_similar_types_are_refused(server: Server) -> None:
    for headers in ({"Content-Type": "application/jsonfoo"}, {"Content-Encoding": "gzip"}):
        assert server.send("POST", "/v1/recommend", {"history": []}, **headers)[0] == 422
