"""Samples as views, and damaged session folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import SessionSet
from onerec.errors import DataError

SEQUENCES = [[4, 1, 2], [], [0, 3, 3, 1, 4, 2]]
SESSIONS = [
    # user_row, start, split, target
    (0, 1, "train", [1, 2]),
    (2, 0, "train", [0]),
    (2, 2, "train", [3, 1, 4]),
    (2, 5, "valid", [2]),
    (0, 3, "test", [0, 2]),
]


def write(folder: Path) -> Path:
    n = 5
    pq.write_table(
        pa.table(
            {
                "item_index": pa.array(range(n), pa.int32()),
                "item_id": list("abcde"),
                "text": ["t"] * n,
                "tags": pa.array([[]] * n, pa.list_(pa.string())),
                "duration_ms": pa.nulls(n, pa.int64()),
                "train_count": [1] * n,
            }
        ),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "user_row": pa.array(range(3), pa.int32()),
                "user_id": [10, 11, 12],
                "items": pa.array(SEQUENCES, pa.list_(pa.int32())),
                "timestamps": pa.array([[*range(len(s))] for s in SEQUENCES], pa.list_(pa.int64())),
            }
        ),
        folder / "sequences.parquet",
    )
    rows, starts, splits, targets = zip(*SESSIONS, strict=True)
    pq.write_table(
        pa.table(
            {
                "user_row": pa.array(rows, pa.int32()),
                "start": pa.array(starts, pa.int32()),
                "split": splits,
                "timestamp": pa.array(starts, pa.int64()),
                "target": pa.array(targets, pa.list_(pa.int32())),
                "watch_time_ms": pa.nulls(len(rows), pa.int64()),
                "watched": pa.array([1] * len(rows), pa.int32()),
                "interactions": pa.array([0] * len(rows), pa.int32()),
            }
        ),
        folder / "sessions.parquet",
    )
    np.save(folder / "embeddings.npy", np.zeros((n, 2), dtype=np.float32))
    (folder / "funnel.json").write_text("{}")
    return folder


def test_samples(tmp_path: Path) -> None:
    found = SessionSet.load(write(tmp_path))
    assert found.n_items == 5
    for split in ("train", "valid", "test"):
        rows = [session for session in SESSIONS if session[2] == split]
        samples = found.samples(split)
        assert len(samples) == len(rows)
        for i, (user, start, _, target) in enumerate(rows):
            assert samples.history(i).tolist() == SEQUENCES[user][:start]
            assert samples.history(i).base is not None or start == 0
            assert samples.target(i).tolist() == target
            assert samples.user_row[i] == user
    train = found.samples("train")
    assert train.history(2).base is train.history(0).base
    assert train.histories([2, 1, 0], 1).tolist() == [[3], [-1], [4]]
    assert train.histories([2, 0], 3).tolist() == [[0, 3, -1], [4, -1, -1]]
    assert train.targets([2, 1], 2).tolist() == [[3, 1], [0, -1]]
    taken = train.take([2, 0, 2])
    assert [taken.history(i).tolist() for i in range(3)] == [[0, 3], [4], [0, 3]]
    assert [taken.target(i).tolist() for i in range(3)] == [[3, 1, 4], [1, 2], [3, 1, 4]]
    assert len(train.take([])) == 0
    with pytest.raises(ValueError, match="split: wanted one of train, valid, test, got 'dev'"):
        found.samples("dev")


def change(name: str, column: str, values: pa.Array | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        at = table.column_names.index(column)
        table = table.remove_column(at)
        if values is not None:
            table = table.add_column(at, column, values)
        pq.write_table(table, path)

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-10])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("sessions.parquet"), r"sessions\.parquet: not a whole Parquet file"),
        (cut("embeddings.npy"), r"embeddings\.npy: not a whole \.npy file"),
        (
            lambda f: (f / "funnel.json").write_text('{"a": '),
            r"funnel\.json: not whole JSON",
        ),
        (lambda f: (f / "items.parquet").unlink(), r"items\.parquet: there is no such file"),
        (lambda f: (f / "funnel.json").unlink(), r"funnel\.json: there is no such file"),
        (
            change("sessions", "target", None),
            r"sessions\.parquet, column 'target': the column is missing",
        ),
        (
            change("sessions", "start", pa.array([["x"]] * 5)),
            r"sessions\.parquet, column 'start': wanted int32, got list",
        ),
        (
            change("sequences", "items", pa.array([[5], [], []], pa.list_(pa.int32()))),
            r"sequences\.parquet, column 'items': wanted 0\.\.4, got 5\.\.5",
        ),
        (
            change("sessions", "user_row", pa.array([0, 1, 2, 3, 0], pa.int32())),
            r"sessions\.parquet, column 'user_row': wanted 0\.\.2, got 0\.\.3",
        ),
        (
            change("sessions", "start", pa.array([1, 0, 7, 5, 3], pa.int32())),
            r"sessions\.parquet, column 'start', row 2: wanted 0\.\.6 .* got 7",
        ),
        (
            lambda f: np.save(f / "embeddings.npy", np.zeros((4, 2), dtype=np.float32)),
            r"embeddings\.npy: wanted float32 \[5, d\] .* got float32 \[4, 2\]",
        ),
    ],
    ids=[
        "sessions cut",
        "vectors cut",
        "funnel cut",
        "no items",
        "no funnel",
        "no target",
        "start of another type",
        "item out of range",
        "user out of range",
        "history longer than the sequence",
        "vectors of another length",
    ],
)
def test_damaged_folder(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(write(tmp_path))
    with pytest.raises(DataError, match=message):
        SessionSet.load(tmp_path)


def test_funnel_is_read(tmp_path: Path) -> None:
    (write(tmp_path) / "funnel.json").write_text(json.dumps({"rule": "next"}))
    assert SessionSet.load(tmp_path).funnel == {"rule": "next"}
