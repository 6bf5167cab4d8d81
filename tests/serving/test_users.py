"""Histories that the server keeps: from the run, from events, and gone when they should be."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')
pytest.importorskip("uvicorn", reason='needs the extra "serve"')

from serving_helpers import Server, run_command, write_export

from onerec import Recommender
from onerec.errors import DataError
from onerec.serving.config import ServeConfig
from onerec.serving.users import UserStore, histories_of_run

MOST = 6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UserStore]:
    UserStore.make(tmp_path / "users.db", [("ann", [1, 2]), (7, [3]), ("text", ["a", "b"])])
    made = UserStore(tmp_path / "users.db", MOST)
    yield made
    made.close()


def test_histories_are_kept_in_order_bounded_and_forgotten(store: UserStore) -> None:
    assert store.history("ann") == [1, 2]
    assert store.history(7) == store.history("7") == [3]
    assert store.history("text") == ["a", "b"]
    assert store.history("nobody") == []
    assert store.add("ann", [5, 4]) == 4
    assert store.add("ann", [6, 7, 8]) == MOST
    assert store.history("ann") == [2, 5, 4, 6, 7, 8]
    assert store.add("new", [9]) == 1
    assert store.forget("ann")
    assert not store.forget("ann")
    assert store.history("ann") == []


def test_writers_lose_nothing(store: UserStore, tmp_path: Path) -> None:
    """Four threads on one connection and four on another, as of two processes."""
    other = UserStore(tmp_path / "users.db", 1000)
    mine = UserStore(tmp_path / "users.db", 1000)

    def write(kept: UserStore, number: int) -> None:
        for _ in range(20):
            kept.add("busy", [number])

    threads = [threading.Thread(target=write, args=((mine, other)[n % 2], n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(mine.history("busy")) == sorted([*range(8)] * 20)
    mine.close()
    other.close()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        UserStore(tmp_path / "none.db", MOST)
    (tmp_path / "text.db").write_text("user,items\n" * 100)
    with pytest.raises(DataError, match="wanted a file of users' histories"):
        UserStore(tmp_path / "text.db", MOST)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(DataError, match="wanted a file of users' histories"):
        UserStore(tmp_path / "other.db", MOST)


def write_run(folder: Path) -> None:
    (folder / "sessions").mkdir(parents=True)
    items = {"item_id": [*range(60)], "text": ["a thing"] * 60}
    pq.write_table(pa.table(items), folder / "sessions/items.parquet")
    rows = {"user_id": ["ann", "bob"], "items": [[5, 9, 2], [*range(20)]]}
    pq.write_table(pa.table(rows), folder / "sessions/sequences.parquet")


def test_a_run_has_users(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = dict(histories_of_run(tmp_path, MOST))
    assert found == {"ann": [5, 9, 2], "bob": [*range(14, 20)]}
    with pytest.raises(DataError, match="users: wanted the folder of a run with sessions"):
        dict(histories_of_run(tmp_path / "sessions", MOST))


def test_requests_that_name_a_user_have_a_history(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", ranks=True)
    UserStore.make(tmp_path / "users.db", [("ann", [5, 9]), ("words", ["a"])])
    recommender = Recommender.from_exported(folder, num_threads=1)
    config = ServeConfig(beam_width=8, max_beam_width=64, max_history=MOST, max_batch=3)
    server = Server(recommender, config, None, users=UserStore(tmp_path / "users.db", MOST))

    def ranked(**body: Any) -> list[int]:
        status, got, _ = server.send("POST", "/v1/rank", {"dense_weight": 0.5, **body})
        assert status == 200, got
        items: list[int] = got["items"]
        return items

    def events(*pairs: tuple[Any, list[Any]]) -> tuple[int, Any]:
        rows = [{"user": user, "items": items} for user, items in pairs]
        return server.send("POST", "/v1/events", {"events": rows})[:2]

    try:
        # The history that is kept, what the request has behind it, and who is not known.
        assert ranked(user="ann") == ranked(history=[5, 9])
        assert ranked(user="ann", history=[2]) == ranked(history=[5, 9, 2])
        assert ranked(user="nobody", history=[2]) == ranked(history=[2])
        assert ranked(user="words") == ranked(history=[])  # ids of an earlier catalogue
        # A batch, and events that later requests see.
        assert events(("ann", [2]), (8, [1, 4]))[1]["kept"] == [3, 2]
        assert ranked(user="ann") == ranked(history=[5, 9, 2])
        assert ranked(user="8") == ranked(history=[1, 4])
        _, got, _ = server.send("POST", "/v1/rank/batch", {"users": [{"user": 8}, {"history": []}]})
        _, want, _ = server.send(
            "POST", "/v1/rank/batch", {"users": [{"history": [1, 4]}, {"history": []}]}
        )
        assert got["results"] == want["results"]
        # The latest items that a request may have.
        events(("ann", [*range(10, 15)]))
        assert ranked(user="ann", history=[1, 3]) == ranked(history=[11, 12, 13, 14, 1, 3])
        # What is wrong is refused as a whole.
        assert events(("ann", ["x"]))[0] == 422
        assert events(("ann", []))[0] == 422
        assert events(*[("ann", [1])] * 4)[0] == 422
        assert events(("ann", [*range(MOST + 1)]))[0] == 422
        # A user who wants to be forgotten is.
        assert server.send("DELETE", "/v1/users/ann")[0] == 204
        assert server.send("DELETE", "/v1/users/ann")[0] == 404
        assert ranked(user="ann") == ranked(history=[])
    finally:
        server.stop()


def test_a_server_without_histories_has_no_such_routes(tmp_path: Path) -> None:
    recommender = Recommender.from_exported(write_export(tmp_path / "export", ranks=True))
    server = Server(recommender, ServeConfig(beam_width=8), "t", users=None)
    try:
        body = {"events": [{"user": 1, "items": [1]}]}
        assert server.send("POST", "/v1/events", body, token="t")[0] == 404
        assert server.send("DELETE", "/v1/users/1", token="t")[0] == 404
    finally:
        server.stop()


def test_the_command_makes_the_file_from_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    folder = write_export(tmp_path / "run/export", ranks=True)
    for visit in range(2):  # the second one finds the file, with what the first one was told
        arguments = ("--users", str(tmp_path / "users.db"), "--beam_width", "8")
        process, client = run_command(folder, *arguments, ONEREC_TOKEN="sesame")
        try:
            assert client.send("POST", "/v1/events", {"events": []}, token=None)[0] == 401
            _, got, _ = client.send("POST", "/v1/rank", {"user": "ann"})
            _, want, _ = client.send("POST", "/v1/rank", {"history": [5, 9, 2, 4][: 3 + visit]})
            assert got["items"] == want["items"]
            body = {"events": [{"user": "ann", "items": [4]}]}
            assert client.send("POST", "/v1/events", body)[1]["kept"] == [4 + visit]
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0
