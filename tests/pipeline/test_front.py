"""A table in memory, and recommendations from it: `onerec.fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import onerec
from onerec.cli.main import main
from onerec.errors import DataError, OneRecError
from onerec.pipeline.requests import read_requests

SMALL: dict[str, Any] = {
    "model": {"d_model": 16, "d_ff": 32, "encoder_layers": 1, "item_negatives": 0},
    "train": {"steps": 120, "eval_every": 0, "num_threads": 1},
    "evaluate": {"resamples": 20, "latency_requests": 0, "unmasked": False},
    "recommend": {"users": 5},
}


def walks() -> pa.Table:
    """Users who walk on a circle of 40 items in steps of 1 or 2."""
    rng, rows = np.random.default_rng(0), []
    for user in range(80):
        walk = (rng.integers(40) + np.cumsum(rng.integers(1, 3, 10))) % 40
        rows += [(f"u{user}", f"i{i}", 10**12 + 86_400_000 * n) for n, i in enumerate(walk)]
    users, items, times = map(list, zip(*rows, strict=True))
    return pa.table({"user_id": users, "item_id": items, "timestamp": times})


@pytest.fixture(scope="module")
def fitted() -> onerec.Fitted:
    return onerec.fit(walks(), **SMALL)


def test_users_and_histories_get_what_comes_next(fitted: onerec.Fitted) -> None:
    table = fitted.recommend(user_ids=["u3", "u1"], k=4)
    assert table["user_id"].to_pylist() == ["u3"] * 4 + ["u1"] * 4
    assert table["rank"].to_pylist() == [0, 1, 2, 3] * 2
    scores = table["score"].to_pylist()
    assert scores[:4] == sorted(scores[:4], reverse=True)
    near = fitted.recommend(histories=[["i5", "i6", "i8"], ["i30", "i31"]], k=3)
    assert near["request"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert set(near["item_id"].to_pylist()[:2]) <= {"i9", "i10", "i11"}
    assert set(near["item_id"].to_pylist()[3:5]) <= {"i32", "i33", "i34"}


def test_a_users_history_is_that_of_the_log(fitted: onerec.Fitted) -> None:
    log = walks().to_pylist()
    history = [row["item_id"] for row in log if row["user_id"] == "u7"]
    by_user, by_history = (
        fitted.recommend(user_ids=["u7"], k=5),
        fitted.recommend(histories=[history], k=5),
    )
    assert by_user["item_id"].to_pylist() == by_history["item_id"].to_pylist()


def test_saved_and_loaded_is_the_same(fitted: onerec.Fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path / "kept")
    loaded = onerec.load(tmp_path / "kept")
    wanted = fitted.recommend(user_ids=["u0"], k=6)
    assert loaded.recommend(user_ids=["u0"], k=6).equals(wanted)
    measures = loaded.evaluate().to_pylist()
    systems = {row["system"] for row in measures if row["metric"] == "recall@10"}
    assert {"model", "generator", "count ranker", "popularity"} <= systems


def test_frames_of_the_callers_kind(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = walks().to_pandas()
    few = {**SMALL, "train": {**SMALL["train"], "steps": 2}}
    found = onerec.fit(frame, out=tmp_path / "run", **few).recommend(user_ids=["u0"], k=3)
    assert isinstance(found, pandas.DataFrame)
    assert list(found.columns) == ["user_id", "rank", "item_id", "score"]


def test_polars_in_and_out(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.from_arrow(walks()).with_columns(
        polars.from_epoch("timestamp", time_unit="ms")  # polars' own times
    )
    items = polars.DataFrame({"item_id": [f"i{n}" for n in range(40)]}).with_columns(
        text="film " + polars.col("item_id")
    )
    few = {**SMALL, "train": {**SMALL["train"], "steps": 2}}
    fitted = onerec.fit(frame, items=items, embeddings=np.eye(40), out=tmp_path / "run", **few)
    found = fitted.recommend(user_ids=frame["user_id"].unique(maintain_order=True)[:2], k=3)
    assert isinstance(found, polars.DataFrame)
    assert found["user_id"].to_list() == ["u0"] * 3 + ["u1"] * 3
    assert set(found["item_id"]) <= set(items["item_id"])
    measures = fitted.evaluate()
    assert isinstance(measures, polars.DataFrame)
    assert measures.filter(polars.col("system") == "model").height > 0
    assert onerec.load(tmp_path / "run").settings.sessions.embeddings == "auto"


def recommend(
    fitted: onerec.Fitted, users: Path, *flags: str | Path, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """The rows that `onerec recommend --users` writes to stdout."""
    command = ["recommend", "--out", fitted.directory, "--users", users, *flags]
    assert main(list(map(str, command))) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_users_of_a_file(
    fitted: onerec.Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    file = tmp_path / f"users{ending}"
    users = ["u3", "u71"]
    if ending == ".parquet":
        pq.write_table(pa.table({"user_id": users}), file)
    elif ending == ".jsonl":
        file.write_text("".join(json.dumps({"user_id": user}) + "\n" for user in users))
    else:
        file.write_text("user_id\n" + "\n".join(users) + "\n")
    rows = recommend(fitted, file, "--recommend.items", "4", capsys=capsys)
    wanted = fitted.recommend(user_ids=users, k=4)
    assert [row["user_id"] for row in rows] == wanted["user_id"].to_pylist()
    assert [row["item_id"] for row in rows] == wanted["item_id"].to_pylist()
    assert [row["rank"] for row in rows] == [0, 1, 2, 3] * 2
    assert (rows[0]["session"], rows[1]["position"]) == (0, 1)


def test_histories_of_a_file(
    fitted: onerec.Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, strange = ["i5", "i6", "i8"], ["i30", "i31", "never seen"]
    wanted = fitted.recommend(histories=[known, strange], k=3)["item_id"].to_pylist()
    lines, spaces, both = (tmp_path / name for name in ("h.jsonl", "h.csv", "both.csv"))
    lines.write_text("".join(json.dumps({"history": h}) + "\n" for h in (known, strange)))
    three = ("--recommend.items", "3")
    rows = recommend(fitted, lines, *three, capsys=capsys)
    assert [row["request"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["item_id"] for row in rows] == wanted
    spaces.write_text('history\ni5 i6 i8\n"[""i30"", ""i31"", ""never seen""]"\n')
    assert recommend(fitted, spaces, *three, capsys=capsys) == rows
    # A history stands for the log's; its user may be a new one.
    both.write_text("user_id,history\nnobody,i5 i6 i8\nu3,\n")
    rows = recommend(fitted, both, *three, capsys=capsys)
    assert [row["user_id"] for row in rows] == ["nobody"] * 3 + ["u3"] * 3
    assert [row["item_id"] for row in rows[:3]] == wanted[:3]
    of_log = fitted.recommend(user_ids=["u3"], k=3)["item_id"].to_pylist()
    assert [row["item_id"] for row in rows[3:]] == of_log

    for to in (tmp_path / "picks.parquet", tmp_path / "picks.jsonl"):
        command = ["recommend", "--out", fitted.directory, "--users", both, *three, "--to", to]
        assert main([*map(str, command), "--json"]) == 0
        told = {"recommendations": str(to), "requests": 2, "rows": 6, "without_items": 0}
        assert json.loads(capsys.readouterr().out) == told
    assert [json.loads(line) for line in to.read_text().splitlines()] == rows
    assert pq.read_table(tmp_path / "picks.parquet").to_pylist() == [
        {**row, "score": pytest.approx(row["score"], rel=1e-6)} for row in rows
    ]


def test_integer_ids_are_those_of_the_log(tmp_path: Path) -> None:
    file = tmp_path / "u.csv"
    file.write_text("user_id,history\n007,12 5\n")
    assert read_requests(file, pa.int64(), pa.int32()).keys == [7]
    found = read_requests(file, pa.string(), pa.string())
    assert (found.name, found.keys, found.histories) == ("user_id", ["007"], [["12", "5"]])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "user_id\nu1\nnobody\n", "column 'user_id', row 1: 'nobody' is not in the log"),
        ("b.csv", "uid\nu1\n", "wanted a column 'user_id' or 'history', the file has uid"),
        ("c.jsonl", '{"history": "[1"}\n', "column 'history', row 0: wanted a JSON list"),
        ("d.jsonl", '{"history": [1]}\n', "column 'history', row 0: wanted a string as in the log"),
        ("e.jsonl", "nothing\n", "it cannot be read (Expecting value"),
        ("f.jsonl", "[1]\n", "row 0: wanted an object, got [1]"),
        ("g.parquet", "PAR1", "it cannot be read ("),
        ("h.txt", "u1", "wanted .parquet, .csv, .tsv, .jsonl or .json"),
        ("i.csv", "user_id\n", "the file has no rows"),
        ("j.jsonl", '{"history": null}\n', "row 0: wanted a list of item ids, got null"),
    ],
)
def test_a_bad_file_of_users_is_told(
    fitted: onerec.Fitted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    said: str,
) -> None:
    (tmp_path / name).write_text(content)
    to = tmp_path / "out.parquet"
    command = ["recommend", "--out", fitted.directory, "--users", tmp_path / name, "--to", to]
    assert main(list(map(str, command))) == 1
    assert f"onerec recommend: {tmp_path / name}" in (err := capsys.readouterr().err)
    assert said in err
    assert not to.exists()
    if name == "a.csv":
        assert main([*map(str, command[:-1]), "picks.txt"]) == 1
        assert "to: wanted a file that ends in .parquet, .jsonl, .json" in capsys.readouterr().err


def test_mistakes_are_named(fitted: onerec.Fitted, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="data: wanted a pandas"):
        onerec.fit([1, 2, 3])
    with pytest.raises(TypeError, match="got 'training'"):
        onerec.fit(walks(), training={})
    with pytest.raises(TypeError, match="unknown settings"):
        onerec.fit(walks(), model={"width": 3})
    with pytest.raises(ValueError, match="embeddings: wanted items"):
        onerec.fit(walks(), embeddings=np.zeros((40, 2)))
    with pytest.raises(ValueError, match=r"embeddings: wanted \[1, d\]"):
        onerec.fit(walks(), items=pa.table({"item_id": ["i0"]}), embeddings=np.zeros((40, 2)))
    with pytest.raises(ValueError, match="user_ids or histories"):
        fitted.recommend()
    with pytest.raises(KeyError, match="'nobody' is not in the log"):
        fitted.recommend(user_ids=["nobody"])
    with pytest.raises((DataError, OneRecError), match="no such file"):
        onerec.load(tmp_path)
