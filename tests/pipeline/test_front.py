"""A table in memory, and recommendations from it: `onerec.fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import onerec
from onerec.errors import DataError, OneRecError

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
