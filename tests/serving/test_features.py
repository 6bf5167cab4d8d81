"""Batches of users, the A/B split, the log of what was served, settings from a file."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')
pytest.importorskip("uvicorn", reason='needs the extra "serve"')

from serving_helpers import TOKEN, K, Server, make_catalog, run_command

from onerec import OneRec, OneRecConfig, Recommender
from onerec.data import open_log, read_exposures
from onerec.errors import DataError
from onerec.inference.exported import export
from onerec.serving.config import ServeConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two exports with the same item ids."""
    root = tmp_path_factory.mktemp("features")
    for number in range(2):
        torch.manual_seed(number)
        config = OneRecConfig.preset("paper-tiny", codebook_size=K, session_length=3, init_std=0.3)
        export(OneRec(config).eval(), make_catalog(number, 0), root / f"{number}")
    return [root / "0", root / "1"]


def load(folder: Path) -> Recommender:
    return Recommender.from_exported(folder, num_threads=1)


def test_a_batch_answers_each_user_as_alone(folders: list[Path]) -> None:
    config = ServeConfig(beam_width=8, max_beam_width=64, max_batch=5)
    running = Server(load(folders[0]), config, TOKEN)
    users: list[dict[str, Any]] = [
        {"history": [3, 5], "exclude": [9]},
        {"history": []},
        {"history": [7, 7, 1], "user": "u"},
    ]
    wanted = {"num_sessions": 2, "beam_width": 20}
    status, got, headers = running.send("POST", "/v1/recommend/batch", {"users": users, **wanted})
    assert status == 200, got
    alone = [running.send("POST", "/v1/recommend", {**u, **wanted})[1] for u in users]
    assert [r["sessions"] for r in got["results"]] == [a["sessions"] for a in alone]
    assert got["request_id"] == headers["x-request-id"]
    assert "server-timing" in headers
    status, got, _ = running.send("POST", "/v1/rank/batch", {"users": users, "k": 7})
    alone = [running.send("POST", "/v1/rank", {**u, "k": 7})[1] for u in users]
    assert [r["items"] for r in got["results"]] == [a["items"] for a in alone]
    for body, words in (
        ({"users": []}, "users"),
        ({"users": [{"history": []}] * 6}, "users: wanted at most 5, got 6"),
        ({"users": [{"history": ["a"]}]}, "integers as in the catalogue"),
        ({"users": [{"history": [], "beam_width": 4}]}, "beam_width"),
        ({"users": users, "history": []}, "history"),
    ):
        status, got, _ = running.send("POST", "/v1/recommend/batch", body)
        assert (status, words in got["error"]) == (422, True), got
    running.stop()


def test_a_split_gives_each_user_one_arm_and_counts_both(folders: list[Path]) -> None:
    config = ServeConfig(beam_width=8, split=0.25)
    running = Server(load(folders[0]), config, TOKEN, challenger=load(folders[1]))
    alone = [load(folder) for folder in folders]
    arms: dict[int, str] = {}
    for user in range(200):
        body = {"history": [user % 60], "user": user}
        got = running.send("POST", "/v1/recommend", body)[1]
        arms[user] = got["arm"]
        (wanted,) = alone["ab".index(got["arm"])].recommend([[user % 60]], beam_width=8)
        assert [s["items"] for s in got["sessions"]] == wanted.item_ids
    share = list(arms.values()).count("b") / 200
    assert 0.15 < share < 0.35
    for user in (0, 77, 199):  # the same arm each time, as a number or as text
        body = {"history": [], "user": str(user)}
        assert running.send("POST", "/v1/recommend", body)[1]["arm"] == arms[user]
    assert running.send("POST", "/v1/recommend", {"history": []})[1]["arm"] == "a"
    users = [{"history": [], "user": user} for user in range(50)]
    got = running.send("POST", "/v1/recommend/batch", {"users": users})[1]
    assert [r["arm"] for r in got["results"]] == [arms[user] for user in range(50)]
    text = running.send("GET", "/metrics")[1]
    counted = {
        arm: float(re.findall(rf'onerec_arm_answers_total{{arm="{arm}"}} ([\d.]+)', text)[0])
        for arm in "ab"
    }
    assert counted["a"] + counted["b"] == 200 + 3 + 1 + 50
    assert counted["b"] > 200 * share
    before = running.send("GET", "/v1/version?arm=b")[1]
    body = {"folder": str(folders[0]), "arm": "b"}
    status, now, _ = running.send("POST", "/admin/swap", body)
    assert (status, now["version"], now["arm"]) == (200, before["version"] + 1, "b")
    assert now["export"] != before["export"]
    assert running.send("GET", "/v1/version")[1]["version"] == 1
    assert running.send("GET", "/v1/version?arm=c")[0] == 422
    status, back, _ = running.send("POST", "/admin/rollback", {"arm": "b"})
    assert (status, back["export"]) == (200, before["export"])
    running.stop()


def test_what_was_served_is_read_back_as_a_log(folders: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "served"
    log.mkdir()
    (log / ".served-left-by-a-killed-process.jsonl").write_text("")
    config = ServeConfig(beam_width=8, served_log=str(log), max_beam_width=64)
    running = Server(load(folders[0]), config, TOKEN)
    shown = []
    for user in ("u1", "u2", "u1", None):
        body = {"history": [3, 5], "num_sessions": 2, "user": user}
        got = running.send("POST", "/v1/recommend", body, **{"X-Request-Id": "2024-01-01"})[1]
        if user:
            shown += [
                (user, item, s, p, session["score"])
                for s, session in enumerate(got["sessions"])
                for p, item in enumerate(session["items"])
            ]
    running.send("POST", "/v1/rank", {"history": [3], "k": 4, "user": "u3"})
    running.send("POST", "/v1/recommend", {"history": [3], "beam_width": 10**6, "user": "no"})
    version = running.send("GET", "/v1/version")[1]
    running.stop()
    assert not list(log.glob(".*"))
    table = read_exposures(log)
    rows = [row for row in table.to_pylist() if row["user_id"] != "u3"]
    got_rows = [(r["user_id"], r["item_id"], r["session"], r["position"], r["score"]) for r in rows]
    assert sorted(got_rows) == sorted(shown)
    assert {r["request_id"] for r in rows} == {"2024-01-01"}
    assert {r["history_length"] for r in rows} == {2}
    assert {(r["version"], r["export"], r["policy"]) for r in rows} == {(1, version["export"], "a")}
    ranked = [row for row in table.to_pylist() if row["user_id"] == "u3"]
    assert [row["score"] for row in ranked] == [None] * 4
    pq.write_table(table, tmp_path / "interactions.parquet")
    with open_log(tmp_path) as opened:
        assert opened.interactions.count().to_pyarrow().as_py() == len(table)


def test_a_log_is_ended_at_its_size_and_a_wrong_one_is_told(
    folders: list[Path], tmp_path: Path
) -> None:
    config = ServeConfig(beam_width=8, served_log=str(tmp_path), served_log_megabytes=1)
    running = Server(load(folders[0]), config, TOKEN)
    users = [{"history": [], "user": "u" * 4000} for _ in range(64)]
    for _ in range(4):
        assert running.send("POST", "/v1/recommend/batch", {"users": users})[0] == 200
    running.stop()
    files = sorted(tmp_path.glob("served-*.jsonl"))
    assert len(files) >= 2
    assert len(read_exposures(tmp_path)) == 4 * 64 * 3
    files[0].write_text('{"user_id": 1}\n')
    with pytest.raises(DataError, match="item_id is missing"):
        read_exposures(tmp_path)
    files[0].write_text("{")
    with pytest.raises(DataError, match="wanted JSON lines"):
        read_exposures(tmp_path)
    with pytest.raises(DataError, match=r"wanted served-\*\.jsonl"):
        read_exposures(tmp_path / "none")


def test_settings_come_from_a_file_and_flags_are_stronger(
    folders: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("beam_width: 7\nmax_beam_width: 9\nnum_threads: 1\nsplit: 0.5\n")
    arguments = ("--config", str(path), "--max_beam_width", "8")
    process, client = run_command(folders[0], *arguments)
    status, got, _ = client.send("POST", "/v1/recommend", {"history": [], "beam_width": 9})
    assert (status, got["error"]) == (422, "beam_width: wanted at most 8, got 9")
    status, got, _ = client.send("POST", "/v1/recommend", {"history": [], "num_sessions": 8})
    assert "at most beam_width = 7" in got["error"]
    text = client.send("GET", "/metrics", token=None)[1]
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert float(re.findall(rf"^{name} ([\d.e+]+)$", text, re.M)[0]) > 0
    assert "_created" not in text
    assert re.search(r'^onerec_build_info{version="[^"]+"} 1.0$', text, re.M)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert all(json.loads(line) for line in errors.splitlines())
