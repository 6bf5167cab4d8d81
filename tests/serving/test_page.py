"""The page to try it: what it asks the server, and what a browser makes of it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')

from serving_helpers import TOKEN, Server, write_export

from onerec import Recommender
from onerec.errors import DataError
from onerec.serving.app import create_app
from onerec.serving.config import ServeConfig
from onerec.serving.trial import Tree

CONFIG = ServeConfig(beam_width=16, num_threads=1)
HOSTILE = "<img src=x onerror=alert(1)> & film 7"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def texts() -> list[str | None]:
    return [HOSTILE if i == 7 else None if i == 8 else f"Film number {i}" for i in range(60)]


def write_run(folder: Path, *, ranks: bool) -> Path:
    """The files of a run that the page reads, and its export: lists by a mixture, or sessions."""
    write_export(folder / "export", ranks=ranks)
    (folder / "sessions").mkdir()
    items = {"item_id": list(range(60)), "text": texts()}
    pq.write_table(pa.table(items), folder / "sessions" / "items.parquet")
    taken = pa.array([[3, 7], [8]], pa.list_(pa.int32()))
    users = pa.table({"user_id": ["ann", "bob"], "items": taken})
    pq.write_table(users, folder / "sessions" / "sequences.parquet")
    return folder / "export"


def start(folder: Path, config: ServeConfig = CONFIG, token: str | None = None) -> Server:
    recommender = Recommender.from_exported(folder, num_threads=1)
    return Server(recommender, config, token, source=str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("ranks"), ranks=True)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = start(folder)
    yield running
    running.stop()


def test_users_and_items_to_choose_from(server: Server) -> None:
    _, about, _ = server.send("GET", "/try/about")
    assert about["users"] == ["ann", "bob"]
    assert about["tags"] == ["de", "nl", "fr"]
    assert (about["items"], about["ranks"], about["baseline"]) == (60, True, True)
    _, history, _ = server.send("GET", "/try/history?user=ann")
    assert history == [{"item": "3", "text": "Film number 3"}, {"item": "7", "text": HOSTILE}]
    assert server.send("GET", "/try/history?user=carl")[0] == 404
    # The item of that id first, then those whose words match.
    _, found, _ = server.send("GET", "/try/items?words=5")
    assert [one["item"] for one in found[:3]] == ["5", "15", "25"]
    _, found, _ = server.send("GET", "/try/items?words=NUMBER+film+12")
    assert found == [{"item": "12", "text": "Film number 12"}]
    assert len(server.send("GET", "/try/items?words=film")[1]) == 20


def test_a_list_has_texts_scores_and_paths(server: Server, folder: Path) -> None:
    body = {"history": ["3", "7", "unknown"], "k": 5}
    _, got, _ = server.send("POST", "/try/recommend", body)
    recommender = Recommender.from_exported(folder, num_threads=1)
    mixture = recommender.mixture
    assert mixture is not None
    (found,) = recommender.next_items([[3, 7]], beam_width=16, counts=mixture.counts)
    items, scores = mixture.best(found, 5, exclude_history=True)
    (listed,) = got["lists"]
    assert [int(one["item"]) for one in listed["items"]] == items.tolist()
    assert [one["score"] for one in listed["items"]] == pytest.approx(scores.tolist())
    assert got["known"] == 2
    (wanted,) = mixture.counts.rank([[3, 7]], 5, [[3, 7]])
    assert [int(one["item"]) for one in got["baseline"]] == wanted.tolist()
    for one in listed["items"]:
        assert one["text"] == (texts()[int(one["item"])] or "")
        codes = recommender.catalog.sids[int(one["item"])].tolist()
        assert [step["code"] for step in one["path"]] == codes
        for level, step in enumerate(one["path"], start=1):
            below = (recommender.catalog.sids[:, :level] == codes[:level]).all(axis=1)
            assert step["items"] == below.sum()
            others = {int(other["item"]) for other in step["others"]}
            assert others <= set(np.flatnonzero(below)) - {int(one["item"])}
            assert len(others) == min(3, below.sum() - 1)


def test_filters(server: Server) -> None:
    body = {"history": ["3", "7"], "k": 60, "allow_tags": ["nl"]}
    _, got, _ = server.send("POST", "/try/recommend", body)
    for listed in (got["lists"][0]["items"], got["baseline"]):
        numbers = [int(one["item"]) for one in listed]
        assert len(numbers) == 19, "20 have the tag, 7 is in the history"
        assert {n % 3 for n in numbers} == {1}
    _, got, _ = server.send("POST", "/try/recommend", {**body, "exclude_history": False})
    assert "7" in [one["item"] for one in got["baseline"]]
    status, got, _ = server.send("POST", "/try/recommend", {"history": [], "allow_tags": ["be"]})
    assert (status, "be" in got["error"]) == (422, True)
    assert server.send("POST", "/try/recommend", {"history": [], "k": 2})[0] == 200


def test_sessions_have_a_score_and_no_baseline(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ranks=False)
    running = start(folder)
    try:
        _, got, _ = running.send("POST", "/try/recommend", {"history": ["3"]})
    finally:
        running.stop()
    (wanted,) = Recommender.from_exported(folder).recommend([[3]], beam_width=16, num_sessions=3)
    assert [[int(i["item"]) for i in one["items"]] for one in got["lists"]] == wanted.item_ids
    assert [one["score"] for one in got["lists"]] == pytest.approx(wanted.scores)
    assert got["baseline"] is None


def test_a_token_guards_the_page_and_a_browser_is_asked(folder: Path) -> None:
    running = start(folder, token=TOKEN)
    try:
        for path in ("/", "/try/about", "/try/history?user=ann"):
            status, _, headers = running.send("GET", path, token=None)
            assert (status, headers["www-authenticate"][:6]) == (401, "Basic ")
            basic = base64.b64encode(f":{TOKEN}".encode()).decode()
            given = {"Authorization": f"Basic {basic}"}
            assert running.send("GET", path, token=None, **given)[0] == 200
    finally:
        running.stop()


def test_an_export_outside_of_a_run_shows_no_users_and_no_texts(
    folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "export"
    shutil.copytree(folder, alone)
    running = start(alone)
    try:
        _, about, _ = running.send("GET", "/try/about")
        _, found, _ = running.send("GET", "/try/items?words=12")
    finally:
        running.stop()
    assert about["users"] == []
    assert found == [{"item": "12", "text": ""}]
    running = start(alone, replace(CONFIG, run=str(folder.parent)))
    try:
        assert running.send("GET", "/try/about")[1]["users"] == ["ann", "bob"]
    finally:
        running.stop()
    recommender = Recommender.from_exported(alone, num_threads=1)
    with pytest.raises(DataError, match="run: wanted the folder of a run"):
        create_app(recommender, replace(CONFIG, run=str(tmp_path)))


def test_the_page_can_be_left_out(folder: Path) -> None:
    running = start(folder, replace(CONFIG, page=False))
    try:
        assert running.send("GET", "/")[0] == 404
        assert running.send("GET", "/try/about")[0] == 404
    finally:
        running.stop()


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    _, html, headers = server.send("GET", "/")
    assert headers["content-type"].startswith("text/html")
    assert not re.search(r"https?://|src=|<link|@import|innerHTML|document\.write", html)


def test_paths_by_hand() -> None:
    tree = Tree(np.array([[1, 2], [0, 5], [1, 2], [1, 0], [0, 5]], dtype=np.int32))
    assert tree.path(2) == [
        {"code": 1, "items": 3, "others": [3, 0]},
        {"code": 2, "items": 2, "others": [0]},
    ]
    assert tree.path(3)[1] == {"code": 0, "items": 1, "others": []}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_shows_the_lists(server: Server, tmp_path: Path) -> None:
    def shown(address: str) -> str:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path}"]
        ended = subprocess.run(
            [*map(str, command), f"http://127.0.0.1:{server.port}/{address}"],
            capture_output=True,
            text=True,
            check=True,
        )
        return ended.stdout

    for address in ("", "#user=ann", "#items=3,7"):  # a user of the log is there at once
        dom = shown(address)
        body = dom[: dom.index("<script>")]
        assert 'data-ready="1"' in body
        assert "2 known items in the history" in body
        assert body.count("&lt;img src=x onerror=alert(1)&gt; &amp; film 7") >= 1, "a text, no tag"
        assert "<img" not in body
        _, got, _ = server.send("POST", "/try/recommend", {"history": ["3", "7"]})
        for listed in (got["lists"][0]["items"], got["baseline"]):
            for rank, one in enumerate(listed, start=1):
                assert f"{rank}. {one['text'] or 'item ' + one['item']}" in body
        assert "by counting alone" in body
    assert "0 known items in the history" in shown("#items=nothing")
