"""The server: answers, limits, overload, deadlines, hot swap, drain."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')
uvicorn = pytest.importorskip("uvicorn", reason='needs the extra "serve"')

from serving_helpers import TOKEN, K, Server, Slow, make_catalog, run_command  # noqa: E402

from onerec import OneRec, OneRecConfig, Recommender  # noqa: E402
from onerec.inference import Mixture  # noqa: E402
from onerec.inference.exported import export  # noqa: E402
from onerec.model.counting import CountRanker, popularity  # noqa: E402
from onerec.serving.answer import Answer  # noqa: E402
from onerec.serving.app import JsonLines, create_app  # noqa: E402
from onerec.serving.config import ServeConfig  # noqa: E402
from onerec.serving.metrics import Metrics  # noqa: E402
from onerec.serving.queue import Options, QueueFull  # noqa: E402
from onerec.serving.schema import RankRequest, RecommendRequest  # noqa: E402
from onerec.serving.versions import Draining, Versions  # noqa: E402
from onerec.serving.worker import Expired, Worker  # noqa: E402
from onerec.tokenizer import Catalog  # noqa: E402

CONFIG = ServeConfig(
    beam_width=8, max_beam_width=64, max_body_bytes=4096, max_history=50, num_threads=1
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An export; another model with other items; a catalogue alone; one that does not fit."""
    root = tmp_path_factory.mktemp("folders")
    for number in range(2):
        torch.manual_seed(number)
        config = OneRecConfig.preset("paper-tiny", codebook_size=K, session_length=3, init_std=0.3)
        catalog = make_catalog(number, 1000 * number)
        export(OneRec(config).eval(), catalog, root / f"{number}")
    make_catalog(2, 2000).save(root / "2")
    Catalog.build([1], [[1, 2]], K).save(root / "wrong")
    return [root / name for name in ("0", "1", "2", "wrong")]


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Server]:
    running = Server(Recommender.from_exported(folders[0], num_threads=1), CONFIG, TOKEN)
    yield running
    running.stop()


def test_answers_what_the_recommender_says(server: Server, folders: list[Path]) -> None:
    body = {"history": [3, 77777, 5], "exclude": [9], "num_sessions": 3, "beam_width": 20}
    status, got, headers = server.send("POST", "/v1/recommend", body, **{"X-Request-Id": "abc.1"})
    (wanted,) = Recommender.from_exported(folders[0]).recommend(
        [[3, 5]], exclude=[[9]], num_sessions=3, beam_width=20
    )
    assert status == 200
    assert got["request_id"] == headers["x-request-id"] == "abc.1"
    assert [s["items"] for s in got["sessions"]] == wanted.item_ids
    assert [s["score"] for s in got["sessions"]] == wanted.scores
    assert got["version"] == server.send("GET", "/v1/version")[1]["version"]
    assert re.fullmatch(r"queue;dur=[\d.]+, engine;dur=[\d.]+", headers["server-timing"])


def test_a_mounted_app_answers_the_same(server: Server, folders: list[Path]) -> None:
    """Its paths are not the ones that requests to go past the router have."""
    recommender = Recommender.from_exported(folders[0], num_threads=1)
    mounted = Server(recommender, CONFIG, TOKEN, "/below")
    body = {"history": [3, 5], "num_sessions": 2}
    status, got, headers = mounted.send("POST", "/v1/recommend", body)
    assert (status, got["sessions"]) == (
        200,
        server.send("POST", "/v1/recommend", body)[1]["sessions"],
    )
    assert "server-timing" in headers
    assert mounted.send("POST", "/v1/rank", b"{")[0] == 400
    assert mounted.send("POST", "/v1/rank", b" " * 5000)[0] == 413
    mounted.stop()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 2000 + b"]" * 2000, 400, ""),
        ({}, 422, "history"),
        ({"history": "3"}, 422, "history"),
        ({"history": [1, "a"]}, 422, "history"),
        ({"history": ["\ud800"]}, 400, "not JSON"),
        ({"history": [], "allow_tags": [63]}, 422, "allow_tags"),
        ({"history": [], "allow_tags": "film"}, 422, "allow_tags"),
        ({"history": [], "allow_tags": [1]}, 422, "the catalogue has no tags"),
        ({"history": ["näé"]}, 422, "integers as in the catalogue"),
        ({"history": [2**63]}, 422, "history"),
        ({"history": [1.5]}, 422, "history"),
        ({"history": [True]}, 422, "history"),
        ({"history": [1] * 51}, 422, "at most 50"),
        ({"history": [], "beam_width": 0}, 422, "beam_width"),
        ({"history": [], "beam_width": 65}, 422, "at most 64"),
        ({"history": [], "num_sessions": 9}, 422, "at most beam_width = 8"),
        ({"history": [], "session_length": -1}, 422, "session_length"),
        ({"history": [], "session_length": 4}, 422, "at most 3"),
        ({"history": [], "temperature": 0}, 422, "temperature"),
        (b'{"history": [], "temperature": NaN}', 422, "temperature"),
        ({"history": [], "scoring": "best"}, 422, "scoring"),
        ({"history": [], "deadline_ms": 10**9}, 422, "at most 60000"),
        ({"history": [], "color": "red"}, 422, "color"),
        (b"x" * 5000, 413, "4096 bytes"),
    ],
)
def test_bad_bodies_are_refused(server: Server, body: Any, status: int, words: str) -> None:
    got_status, got, headers = server.send("POST", "/v1/recommend", body)
    assert got_status == status, got
    assert words in got["error"]
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])


def test_rankings_are_answered_and_checked(server: Server, folders: list[Path]) -> None:
    status, got, _ = server.send("POST", "/v1/rank", {"history": [3, 5], "k": 7, "beam_width": 20})
    wanted = Recommender.from_exported(folders[0]).rank([[3, 5]], 7, beam_width=20)
    assert (status, [got["items"]]) == (200, wanted)
    for body, words in (
        ({"history": [], "dense_weight": 0.5}, "no dense head"),
        ({"history": [], "k": 0}, "k:"),
        ({"history": [], "num_sessions": 2}, "num_sessions"),
    ):
        status, got, _ = server.send("POST", "/v1/rank", body)
        assert status == 422
        assert words in got["error"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


def bodies(model: type[RecommendRequest] | type[RankRequest]) -> st.SearchStrategy[Any]:
    """Bodies of fields that the schema knows, with values right and wrong."""
    values = st.integers(-3, 70) | st.lists(st.integers(-(2**70), 2**70) | st.text()) | JSON
    fields = dict.fromkeys(model.model_fields, values)
    fields["history"] = st.lists(st.integers(0, 70), max_size=9) | values
    return st.fixed_dictionaries({"history": fields.pop("history")}, optional=fields) | JSON


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_a_fault_of_the_server(server: Server, data: st.DataObject) -> None:
    path, model = data.draw(
        st.sampled_from([("/v1/recommend", RecommendRequest), ("/v1/rank", RankRequest)])
    )
    body = data.draw(st.binary(max_size=50) | bodies(model))
    status, got, _ = server.send("POST", path, body)
    assert status in (200, 400, 413, 422), got


def test_schemathesis_finds_no_fault(server: Server, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("schemathesis", path=path)
    if program is None:
        pytest.skip("no schemathesis (pip install schemathesis)")
    # Some limits are the model's and the catalogue's, which the schema does not know; a body that
    # breaks it may also be too large; and a deadline of a millisecond may pass.
    (tmp_path / "schemathesis.toml").write_text(
        "[checks]\npositive_data_acceptance.enabled = false\n"
        'negative_data_rejection.expected-statuses = ["4xx"]\n'
        'not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    )
    options = ["--header", f"Authorization: Bearer {TOKEN}", "--seed", "1", "--no-color"]
    result = subprocess.run(
        [program, "run", f"http://127.0.0.1:{server.port}/openapi.json", "-n", "10", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_a_body_of_another_type_is_refused(server: Server) -> None:
    kind = {"Content-Type": "text/plain"}
    status, got, _ = server.send("POST", "/v1/recommend", {"history": []}, **kind)
    assert (status, got["error"].split(":")[0]) == (422, "Content-Type")
    kind = {"Content-Type": "Application/JSON; charset=UTF-8"}
    assert server.send("POST", "/v1/recommend", {"history": []}, **kind)[0] == 200


@pytest.mark.parametrize(
    "nodes", [{}, {"node_outputs": True, "decoder_start": "state"}], ids=["codes", "nodes"]
)
def test_tags_and_the_softmax_of_training_reach_the_engine(
    folders: list[Path], nodes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"encoder": "causal", "n_items": 60, "legal_softmax": True, **nodes}
    fields["item_loss"] = 1.0
    config = OneRecConfig.preset("paper-tiny", codebook_size=K, session_length=3, **fields)
    words = ["de", "nl", "fr"]
    catalog = make_catalog(0, 0).with_tags([words[i % 3] for i in range(60)], words)
    model = OneRec(config).eval()
    model.set_catalog(catalog.sids)
    seen = np.arange(60)
    mixture = Mixture(CountRanker([popularity(seen)], seen), np.ones(3), np.zeros(3))
    recommender = Recommender(model, catalog, backend="native", num_threads=1, mixture=mixture)
    running = Server(recommender, CONFIG, TOKEN)
    try:
        body = {"history": [3], "allow_tags": ["de", 2], "num_sessions": 4}
        _, got, _ = running.send("POST", "/v1/recommend", body)
        _, now, _ = running.send("GET", "/v1/version")
        refused = running.send("POST", "/v1/rank", {"history": [3], "allow_tags": ["be"]})
        body = {"history": [3], "k": 5, "dense_weight": 0.4, "exclude": [7]}
        _, ranked, _ = running.send("POST", "/v1/rank", body)
        _, mixed, _ = running.send("POST", "/v1/rank", {"history": [3], "k": 5})
        _, alone, _ = running.send("POST", "/v1/rank", {"history": [3], "k": 5, "dense_weight": 0})
    finally:
        running.stop()
    plain = Recommender(model, catalog, backend="torch", mixture=mixture)
    (wanted,) = plain.recommend(
        [[3]], beam_width=8, num_sessions=4, allow_tags=[["fr", "de"]], scoring="legal_softmax"
    )
    assert [s["items"] for s in got["sessions"]] == wanted.item_ids
    assert now["tags"] == words
    assert refused[0] == 422
    assert refused[1]["error"] == "allow_tags: the catalogue has no tag 'be'; it has de, nl, fr"
    assert all(item % 3 != 1 for s in wanted.item_ids for item in s)
    assert [ranked["items"]] == plain.rank([[3]], 5, beam_width=8, dense_weight=0.4, exclude=[[7]])
    assert [mixed["items"]] == plain.rank([[3]], 5, beam_width=8) != [alone["items"]]
    assert [alone["items"]] == plain.rank([[3]], 5, beam_width=8, dense_weight=0.0)


def test_slow_and_vanishing_clients_hold_nobody_up(server: Server) -> None:
    body = json.dumps({"history": [3]}).encode()
    head = (
        f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server.port), timeout=60)

    slow = connect()
    for byte in head + body[:-1]:
        slow.sendall(bytes([byte]))
    for sent in (head, head + body[:5], head + body):  # gone before, in and after the body
        for _ in range(10):
            with connect() as gone:
                gone.sendall(sent)
    for _ in range(5):
        assert server.send("POST", "/v1/recommend", {"history": [5]})[0] == 200
    slow.sendall(body[-1:])
    assert slow.recv(12) == b"HTTP/1.1 200"
    slow.close()
    metrics = server.send("GET", "/metrics")[1]
    assert 'status="500"' not in metrics
    assert re.search(r"^onerec_queue_length 0.0$", metrics, re.M)


def test_a_body_without_a_length_is_bounded_too(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = (b" " * 1000 for _ in range(10))
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/recommend", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_token_paths_and_methods(server: Server) -> None:
    for token in (None, "wrong", "\u00fc"):
        status, _, headers = server.send("POST", "/v1/recommend", {"history": []}, token)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert server.send("GET", "/healthz", token=None)[:2] == (200, "ok")
    assert server.send("GET", "/readyz", token=None)[:2] == (200, "ready")
    assert server.send("GET", "/nothing")[0] == 404
    assert server.send("GET", "/v1/recommend")[0] == 405
    assert set(server.send("GET", "/openapi.json")[1]["paths"]) >= {"/v1/recommend", "/admin/swap"}
    text = server.send("GET", "/metrics", token=None)[1]
    assert 'onerec_requests_total{path="other",status="401"} 3.0' in text
    assert "onerec_items_illegal_total 0.0" in text


@pytest.mark.parametrize("token", ["", "sesame\n", "open sesame", "s\u00e9same"])
def test_a_token_that_no_header_brings_is_refused(token: str, folders: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"ONEREC_TOKEN.*visible ASCII") as told:
        create_app(Recommender.from_exported(folders[0]), CONFIG, token=token)
    assert not token or token not in str(told.value)


def test_half_an_export_is_not_taken_for_a_catalogue(
    server: Server, folders: list[Path], tmp_path: Path
) -> None:
    half = shutil.copytree(folders[1], tmp_path / "half")
    (half / "engine.bin").unlink()
    status, got, _ = server.send("POST", "/admin/swap", {"folder": str(half)})
    assert status == 422
    assert "engine.bin missing" in got["error"]


def test_no_admin_without_a_token(folders: list[Path]) -> None:
    open_ = Server(Recommender.from_exported(folders[0]), CONFIG, None)
    assert open_.send("POST", "/admin/swap", {"folder": "x"}, None)[0] == 404
    assert open_.send("POST", "/v1/recommend", {"history": []}, None)[0] == 200
    open_.stop()


def test_swaps_under_load_fail_no_request(server: Server, folders: list[Path]) -> None:
    """Each answer's items are in the catalogue of the version that it names."""
    first = server.send("GET", "/v1/version")[1]["version"]
    items_of = {first: range(0, 60)}
    stop = threading.Event()
    answers: list[tuple[int, Any]] = []

    def ask(client: int) -> None:
        number = 0
        while not stop.is_set() or number < 40:
            number += 1
            body = {"history": [client, 1000 + number % 60], "num_sessions": 2}
            status, got, _ = server.send("POST", "/v1/recommend", body)
            answers.append((status, got))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, client) for client in range(4)]
        for number in range(10):
            which = (1, 2, 0)[number % 3]
            status, got, _ = server.send("POST", "/admin/swap", {"folder": str(folders[which])})
            assert status == 200
            items_of[got["version"]] = range(1000 * which, 1000 * which + 60)
            status, refused, _ = server.send("POST", "/admin/swap", {"folder": str(folders[3])})
            assert (status, "levels" in refused["error"]) == (422, True)
        before = items_of[got["version"] - 1]
        got = server.send("POST", "/admin/rollback")[1]
        items_of[got["version"]] = before
        stop.set()
        for client in clients:
            client.result()
    assert server.send("POST", "/admin/rollback")[0] == 422  # one earlier version is kept
    assert server.send("POST", "/admin/swap", {"folder": "/none"})[0] == 422
    assert len(answers) >= 160
    for status, got in answers:
        assert status == 200
        for session in got["sessions"]:
            assert all(item in items_of[got["version"]] for item in session["items"])
    assert "onerec_items_illegal_total 0.0" in server.send("GET", "/metrics")[1]
    server.send("POST", "/admin/swap", {"folder": str(folders[0])})


def test_the_queue_is_bounded_late_requests_are_dropped_and_the_rest_is_drained(
    folders: list[Path],
) -> None:
    slow = Slow(Recommender.from_exported(folders[0]))
    config = ServeConfig(max_queue=4, max_rows=20)
    arms = {"a": Versions(slow, "", config)}  # type: ignore[arg-type]
    worker = Worker(arms, Metrics(), config)
    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()

    def submit(history: list[int], options: Options, seconds: float = 60) -> Future[Answer]:
        asked = worker.ask(history, [], options, seconds)
        future = asyncio.run_coroutine_threadsafe(asked, loop)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()  # it is queued
        return future

    eight = Options(None, 8, 1, True, None, None, 1.0)
    first = submit([1], eight)
    assert slow.entered.wait(10)
    late = submit([2], eight, 0.001)
    gone = submit([2], eight)
    waiting = [submit([i], eight) for i in (3, 4)]
    with pytest.raises(QueueFull) as full:
        submit([5], eight).result()
    gone.cancel()
    assert full.value.retry_after >= 1
    time.sleep(0.01)
    slow.go.set()
    assert first.result().batch == 1
    with pytest.raises(Expired):
        late.result()
    assert [f.result().batch for f in waiting] == [2, 2]
    # 20 rows hold two requests of 8; other options wait for a batch of their own.
    slow.go.clear()
    slow.entered.clear()
    slow.batches.clear()
    block = submit([1], eight)
    assert slow.entered.wait(10)
    rest = [submit([1], o) for o in (eight, Options(1, 8, 1, True, None, "raw", 1.0))]
    rest += [submit([1], eight) for _ in range(2)]
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    while worker.ready:
        time.sleep(0.001)
    with pytest.raises(Draining):
        submit([1], eight).result()
    slow.go.set()
    stopping.join()
    assert all(f.exception() is None for f in (block, *rest))
    assert slow.batches == [1, 2, 1, 1]
    loop.call_soon_threadsafe(loop.stop)
    running.join()
    loop.close()


def test_logs_are_lines_of_json() -> None:
    record = logging.LogRecord("onerec", logging.INFO, "", 0, "request", None, None)
    record.fields = {"status": 200, "path": "/v1/recommend"}
    line = json.loads(JsonLines().format(record))
    assert line["message"] == "request"
    assert line["status"] == 200


def test_the_command_serves_drains_on_sigterm_and_comes_back_after_sigkill(
    folders: list[Path],
) -> None:
    process, client = run_command(folders[0])
    first = client.send("POST", "/v1/recommend", {"history": [1]})[1]["sessions"]
    asking = ThreadPoolExecutor(1).submit(client.send, "POST", "/v1/recommend", {"history": [2]})
    process.kill()
    process.communicate(timeout=60)
    assert isinstance(asking.exception(), OSError | http.client.HTTPException | None)

    process, client = run_command(folders[0])
    status, got, _ = client.send("POST", "/v1/recommend", {"history": [1]})
    assert (status, got["sessions"]) == (200, first)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    (request,) = (line for line in lines if line.get("path") == "/v1/recommend")
    assert request["status"] == 200
    assert request["batch"] == 1
    assert 0 < request["engine_ms"] <= request["ms"]


def test_a_port_that_is_taken_is_told(folders: list[Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "onerec", "serve", str(folders[0]), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"onerec serve: cannot listen on 127.0.0.1:{port}"
    assert "address already in use" in ended.stderr


def test_the_load_script_checks_every_answer() -> None:
    root = Path(__file__).resolve().parents[2]
    arguments = ["swaps", "--requests", "300", "--swaps", "6", "--clients", "3", "--items", "500"]
    script = root / "benchmarks" / "load_serving.py"
    ended = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads(ended.stdout)
    assert (record["requests"], record["failed"], record["items of another version"]) == (300, 0, 0)
    assert record["versions that answered"] >= 4
