"""Every way a data file can be bad, and what the three layouts become."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import LogSource, SessionConfig, SessionSet, build_sessions, open_log
from onerec.errors import DataError

N = 40


def interactions(**columns: Any) -> pa.Table:
    base: dict[str, Any] = {
        "user_id": [n % 4 for n in range(N)],
        "item_id": [n % 5 for n in range(N)],
        "timestamp": list(range(N)),
    }
    return pa.table({k: v for k, v in (base | columns).items() if v is not None})


def items(**columns: Any) -> pa.Table:
    base: dict[str, Any] = {"item_id": list(range(5)), "text": list("abcde")}
    return pa.table({k: v for k, v in (base | columns).items() if v is not None})


def write(folder: Path, log: pa.Table | None = None, catalogue: pa.Table | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(interactions() if log is None else log, folder / "interactions.parquet")
    pq.write_table(items() if catalogue is None else catalogue, folder / "items.parquet")
    return folder


def rows_of(log: LogSource) -> list[dict[str, Any]]:
    return log.interactions.order_by("row").to_pyarrow().to_pylist()  # type: ignore[no-any-return]


def at(value: Any, row: int, other: Any) -> list[Any]:
    """`other` in every row but one."""
    return [value if n == row else other for n in range(N)]


BAD_INTERACTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": (
        {"timestamp": None},
        r"interactions\.parquet, column 'timestamp': the column is missing; the file has user_id",
    ),
    "wrong type": (
        {"timestamp": [str(n) for n in range(N)]},
        r"column 'timestamp': wanted integers of 0 or more \(ms since 1970\), timestamps or "
        r"dates, never null, got string",
    ),
    "times as floats": (
        {"timestamp": [float(n) for n in range(N)]},
        r"column 'timestamp': wanted integers .* got double",
    ),
    "negative timestamp": (
        {"timestamp": at(-7, 11, 5)},
        r"column 'timestamp', row 11: wanted integers .* never null, got -7",
    ),
    "null timestamp": (
        {"timestamp": at(None, 3, 5)},
        r"column 'timestamp', row 3: .* got None",
    ),
    "null user id": ({"user_id": at(None, 8, 1)}, r"column 'user_id', row 8: .* got None"),
    "null item id": ({"item_id": at(None, 0, 1)}, r"column 'item_id', row 0: .* got None"),
    "id of another type": (
        {"item_id": [[n] for n in range(N)]},
        r"column 'item_id': wanted integers below 2\^63 or strings, never null, got list",
    ),
    "hash as an id": (
        {"user_id": pa.array(at(2**63 + 5, 4, 2**63 - 1), pa.uint64())},
        r"column 'user_id', row 4: wanted integers below 2\^63 or .* got 9223372036854775813",
    ),
    "negative watch time": (
        {"watch_time_ms": at(-1, 20, None)},
        r"column 'watch_time_ms', row 20: wanted numbers of 0 or more .* got -1",
    ),
    "NaN watch time": (
        {"watch_time_ms": at(float("nan"), 21, 0.5)},
        r"column 'watch_time_ms', row 21: .* got nan",
    ),
    "flag of 2": (
        {"like": at(2, 30, 0)},
        r"column 'like', row 30: wanted booleans or 0/1 .* got 2",
    ),
    "flag as text": (
        {"like": ["yes"] * N},
        r"column 'like': wanted booleans or 0/1 .* got string",
    ),
    "null request id": (
        {"request_id": at(None, 39, 4)},
        r"column 'request_id', row 39: .* got None",
    ),
    "unknown split": (
        {"split": at("dev", 6, "train")},
        r"column 'split', row 6: wanted train, valid or test, got 'dev'",
    ),
}


@pytest.mark.parametrize(
    ("columns", "message"), BAD_INTERACTIONS.values(), ids=BAD_INTERACTIONS.keys()
)
def test_bad_interactions(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path, interactions(**columns))
    with pytest.raises(DataError, match=message):
        open_log(tmp_path)


BAD_ITEMS: dict[str, tuple[pa.Table, str]] = {
    "duplicate id": (
        items(item_id=[0, 1, 2, 1, 4]),
        r"items\.parquet, column 'item_id', row 3: the id 1 occurs twice",
    ),
    "null id": (items(item_id=[0, None, 2, 3, 4]), r"column 'item_id', row 1: .* got None"),
    "no ids": (items(item_id=None), r"column 'item_id': the column is missing"),
    "tags as numbers": (
        items(tags=list(range(5))),
        r"column 'tags': wanted strings or lists of strings, got int64",
    ),
    "text as numbers": (items(text=list(range(5))), r"column 'text': wanted strings, got int64"),
    "no rows": (items().slice(0, 0), r"items\.parquet: the file has no rows"),
}


@pytest.mark.parametrize(("table", "message"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_bad_items(tmp_path: Path, table: pa.Table, message: str) -> None:
    write(tmp_path, catalogue=table)
    with pytest.raises(DataError, match=message):
        open_log(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def overwrite_pages(path: Path) -> None:
    """Leaves the footer whole and breaks the data pages before it."""
    group = pq.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    for n in range(4, 4 + group.total_byte_size // 2):
        data[n] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["interactions", "items"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a whole Parquet file"),
        (lambda path: path.write_bytes(b""), "not a whole Parquet file"),
        (lambda path: path.write_text("user_id,item_id\n1,2\n"), "not a whole Parquet file"),
        (overwrite_pages, "the file is damaged"),
    ],
    ids=["cut short", "empty file", "CSV", "broken pages"],
)
def test_damaged_parquet(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    write(tmp_path)
    damage(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=rf"{name}\.parquet: {message}"):
        open_log(tmp_path)


def test_missing_folder_file_and_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: there is no such folder or file"):
        open_log(tmp_path / "nowhere")
    (tmp_path / "log.xlsx").write_text("user_id,item_id\n1,2\n")
    told = (
        r"interactions\.parquet: there is no such file; the folder has log\.xlsx \(.*what is read"
    )
    with pytest.raises(DataError, match=told):
        open_log(tmp_path)
    write(tmp_path, interactions().slice(0, 0))
    with pytest.raises(DataError, match=r"interactions\.parquet: the file has no rows"):
        open_log(tmp_path)
    with pytest.raises(ValueError, match=r"kind: wanted one of auto, .* got 'movielens'"):
        open_log(tmp_path, kind="movielens")


def build(folder: Path, embeddings: str = "auto") -> SessionSet:
    config = SessionConfig(rule="next", length=1, split="last", embeddings=embeddings)
    with open_log(folder) as log:
        return build_sessions(log, config, folder / "out")


VECTORS = np.arange(10, dtype=np.float32).reshape(5, 2)


def with_nan() -> np.ndarray[Any, Any]:
    vectors = VECTORS.copy()
    vectors[3, 1] = np.nan
    return vectors


BAD_VECTORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another length": (
        lambda f: np.save(f / "embeddings.npy", VECTORS[:4]),
        r"embeddings\.npy: wanted 5 rows \(one an item id\), got 4 vectors",
    ),
    "NaN": (
        lambda f: np.save(f / "embeddings.npy", with_nan()),
        r"embeddings\.npy, row 3: wanted finite numbers, got NaN or infinity .* item 3",
    ),
    "one axis": (
        lambda f: np.save(f / "embeddings.npy", VECTORS[:, 0]),
        r"wanted floats \[N, d\], got float32 \[5\]",
    ),
    "integers": (
        lambda f: np.save(f / "embeddings.npy", VECTORS.astype(int)),
        r"wanted floats \[N, d\], got int64",
    ),
    "cut short": (
        lambda f: (np.save(f / "embeddings.npy", VECTORS), cut(f / "embeddings.npy")),
        r"embeddings\.npy: not a whole \.npy file",
    ),
    "npz cut short": (
        lambda f: (
            np.savez(f / "embeddings.npz", item_ids=np.arange(5), vectors=VECTORS),
            cut(f / "embeddings.npz"),
        ),
        r"embeddings\.npz: not a whole \.npz file",
    ),
    "npz without ids": (
        lambda f: np.savez(f / "embeddings.npz", vectors=VECTORS),
        r"wanted the arrays item_ids and vectors, got vectors",
    ),
    "npz of another length": (
        lambda f: np.savez(f / "embeddings.npz", item_ids=np.arange(4), vectors=VECTORS),
        r"wanted 4 rows \(one an item id\), got 5 vectors",
    ),
    "npz with an id twice": (
        lambda f: np.savez(
            f / "embeddings.npz", item_ids=np.array([0, 1, 2, 1, 4]), vectors=VECTORS
        ),
        r"embeddings\.npz, row 3: item id 1 occurs twice",
    ),
    "npz of other items": (
        lambda f: np.savez(
            f / "embeddings.npz", item_ids=np.array(["a", "b", "c", "d", "e"]), vectors=VECTORS
        ),
        r"no item of the log has a vector here \(first id 'a', the log's 0\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_bad_vectors(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    write(tmp_path)
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        build(tmp_path)
    assert not (tmp_path / "out").exists()


def embedding_column(values: list[list[float] | None], size: int = 2) -> pa.Array:
    return pa.array(values, pa.list_(pa.float32(), size))


@pytest.mark.parametrize("type_", [pa.list_(pa.float32(), 2), pa.list_(pa.float64())])
def test_vectors_as_a_column(type_: pa.DataType, tmp_path: Path) -> None:
    """Of a fixed size, and as pandas writes them."""
    column = pa.array([*VECTORS[:4].tolist(), None], type_)
    write(tmp_path, catalogue=items(embedding=column))
    found = build(tmp_path, "embedding")
    assert found.funnel["embeddings"]["source"] == "embedding"
    assert found.funnel["embeddings"]["filled"] == 1
    np.testing.assert_array_equal(found.embeddings[:4], VECTORS[:4])
    # No tags: the mean of the others, plus a tenth of their spread times a normal draw.
    distance = np.abs(found.embeddings[4] - VECTORS[:4].mean(axis=0)) / VECTORS[:4].std(axis=0)
    assert (distance < 0.5).all()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1]] * 5), "wanted lists of floats, got list"),
        (
            pa.array([None, [1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0]]),
            "row 3: wanted vectors of one length, 2 as the first, got 1",
        ),
        (pa.array([[]] * 5, pa.list_(pa.float32())), "row 0: wanted vectors of one length"),
        (embedding_column([None] * 5), "every vector is null"),
        (embedding_column([[1.0, 2.0]] * 4 + [[1.0, None]]), "row 4: wanted finite numbers"),
    ],
    ids=["integers", "ragged", "empty", "all null", "null inside"],
)
def test_bad_vector_column(tmp_path: Path, column: pa.Array, message: str) -> None:
    write(tmp_path, catalogue=items(embedding=column))
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def test_npy_without_items_has_no_order(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "items.parquet").unlink()
    np.save(tmp_path / "embeddings.npy", VECTORS)
    with pytest.raises(DataError, match=r"a \.npy file needs items\.parquet"):
        build(tmp_path)


def test_canonical_log(tmp_path: Path) -> None:
    """Types come out in the schema's, whatever fitting type they came in."""
    log = interactions(
        user_id=pa.array([f"u{n % 4}" for n in range(N)]).dictionary_encode(),
        item_id=pa.array([n % 5 for n in range(N)], pa.uint16()),
        timestamp=pa.array(range(N), pa.int32()),
        watch_time_ms=pa.array([n * 0.6 for n in range(N)], pa.float64()),
        like=pa.array([n % 2 == 0 for n in range(N)]),
        hate=pa.array([0.0] * N),
        follow=pa.nulls(N),
        notes=["kept out"] * N,
    )
    write(
        tmp_path,
        log,
        items(
            item_id=[4, 3, 2, 1, 0],
            text=["four", None, "two", "one", "nil"],
            tags=pa.array([["x", "y"], None, [], ["z"], ["x"]], pa.large_list(pa.large_string())),
            duration_ms=[1.4, None, 3.0, 4.0, 5.0],
        ),
    )
    with open_log(tmp_path) as source:
        assert source.kind == "parquet"
        assert source.time == "ms"
        assert "40 interactions" in source.describe()
        assert source.describe().startswith(f"log at {tmp_path}: "), "the schema is no format"
        first = rows_of(source)[3]
        assert first == {
            "user_id": "u3",
            "item_id": 3,
            "timestamp": 3,
            "watch_time_ms": 2,
            "like": 0,
            "hate": 0,
            "row": 3,
        }
        assert source.items.to_pylist()[:2] == [
            {
                "item_index": 0,
                "item_id": 4,
                "text": "four",
                "tags": ["x", "y"],
                "duration_ms": 1,
            },
            {"item_index": 1, "item_id": 3, "text": "item 3", "tags": [], "duration_ms": None},
        ]


WHEN = np.array(["2026-03-29T01:30:00.123456789", "1990-01-01T00:00:00.000999"], "datetime64[ns]")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Amsterdam"])
def test_times_are_utc_milliseconds_of_any_unit_and_zone(
    unit: str, zone: str | None, tmp_path: Path
) -> None:
    at = np.resize(WHEN, N).astype(f"datetime64[{unit}]")
    write(tmp_path, interactions(timestamp=pa.array(at).cast(pa.timestamp(unit, tz=zone))))
    whole = 1774747800000 if unit == "s" else 1774747800123
    with open_log(tmp_path) as source:
        assert [row["timestamp"] for row in rows_of(source)[:2]] == [whole, 631152000000]
        assert "times 1990-01-01 to 2026-03-29" in source.describe()


@pytest.mark.parametrize("type_", [pa.date32(), pa.date64()])
def test_a_date_is_its_midnight(type_: pa.DataType, tmp_path: Path) -> None:
    write(tmp_path, interactions(timestamp=pa.array(np.resize(WHEN, N)).cast(type_, safe=False)))
    with open_log(tmp_path) as source:
        assert [row["timestamp"] for row in rows_of(source)[:2]] == [1774742400000, 631152000000]


def test_a_time_before_1970_or_null_is_refused(tmp_path: Path) -> None:
    for value in (-1, None):
        write(tmp_path, interactions(timestamp=pa.array(at(value, 4, 9), pa.timestamp("ms"))))
        with pytest.raises(DataError, match=rf"'timestamp', row 4: wanted .*, got {value}"):
            open_log(tmp_path)


def test_a_tag_may_be_a_word(tmp_path: Path) -> None:
    words = pa.array(["a", None, "b", "a", "c"]).dictionary_encode()
    write(tmp_path, catalogue=items(tags=words))
    with open_log(tmp_path) as source:
        assert source.items["tags"].to_pylist() == [["a"], [], ["b"], ["a"], ["c"]]


OWN = {
    "user_id": "uid",
    "item_id": "video",
    "timestamp": "shown_at",
    "session_id": "request_id",
    "like": "liked",
    "split": "part",
    "items.item_id": "video",
    "items.text": "title",
    "items.embedding": "clip",
}


def write_own(folder: Path, **columns: Any) -> Path:
    """A log under the names of `OWN`; its request_id is a session's."""
    log = interactions(
        request_id=[n // 4 for n in range(N)], like=at(1, 3, 0), split=["train"] * N, **columns
    )
    names = {v: k for k, v in OWN.items() if not k.startswith("items.")}
    ours = {v: k for k, v in names.items()} | {"request_id": "request_id"}
    own = items(embedding=embedding_column([*VECTORS[:4].tolist(), None]))
    return write(
        folder,
        log.rename_columns([ours.get(name, name) for name in log.column_names]),
        own.rename_columns(["video", "title", "clip"]),
    )


def test_own_names(tmp_path: Path) -> None:
    write_own(tmp_path)
    with open_log(tmp_path, columns=OWN) as source:
        assert rows_of(source)[3] == {
            "user_id": 3,
            "item_id": 3,
            "timestamp": 3,
            "session_id": 0,
            "like": 1,
            "split": "train",
            "row": 3,
        }, "a column that is the session_id is no request_id any more"
        assert source.items["text"].to_pylist() == list("abcde")
        assert list(source.vectors) == ["embedding"]
        ids, vectors = source.vectors["embedding"].load()
        assert ids.tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(vectors, VECTORS[:4])
        assert source.default_split == "column"
        assert "times 1970-01-01 to 1970-01-01" in source.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"user_id": "usr"},
            r"interactions\.parquet, column 'usr': the column is missing; the file has uid, "
            r"video, .*\. Under another name: --columns\.user_id NAME \(",
        ),
        (
            {"user_id": "usr", "item_id": "id"},
            r"column 'usr': the column is missing, and so is 'id'; .*: --columns\.user_id NAME "
            r"--columns\.item_id NAME",
        ),
        ({"hate": "hated"}, r"column 'hated': the column is missing; .* --columns\.hate NAME"),
        ({"items.tags": "words"}, r"items\.parquet, column 'words': .* the file has video, title"),
        ({"like": "shown_at"}, r"interactions\.parquet, column 'shown_at': `columns` has it twice"),
        ({"like": "shown_at", "timestamp": "at"}, r"column 'at': the column is missing"),
        ({"like": "video_s"}, r"column 'video_s', row 2: wanted booleans or 0/1 .* got 2"),
        ({"split": "word"}, r"column 'word', row 0: wanted train, valid or test, got 'dev'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_own_names(tmp_path: Path, change: dict[str, str], message: str) -> None:
    write_own(tmp_path, video_s=list(range(N)), word=["dev"] * N)
    with pytest.raises(DataError, match=message):
        open_log(tmp_path, columns=OWN | change)


def test_own_names_of_what_there_is_not(tmp_path: Path) -> None:
    write_own(tmp_path)
    with pytest.raises(ValueError, match=r"columns: the schema has user_id, .*; got usr_id$"):
        open_log(tmp_path, columns={"usr_id": "uid"})
    with pytest.raises(ValueError, match="only kind 'parquet' takes other names, got kind 'amaz"):
        open_log(tmp_path, kind="amazon", columns=OWN)
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items\.parquet: there is no such file"):
        open_log(tmp_path, columns=OWN)


def test_items_come_from_the_log_where_there_is_no_table(tmp_path: Path) -> None:
    write(tmp_path, interactions(duration_ms=[1000 * (n % 5) + n for n in range(N)]))
    (tmp_path / "items.parquet").unlink()
    with open_log(tmp_path) as source:
        assert source.items["item_id"].to_pylist() == [0, 1, 2, 3, 4]
        assert source.items["duration_ms"].to_pylist() == [35, 1036, 2037, 3038, 4039]
        assert source.items["text"][2].as_py() == "item 2"
    assert build(tmp_path).funnel["embeddings"]["source"] == "cooccurrence"


def kuairand(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    zero = [0, 0, 0, 0]
    rows = {
        "user_id": pa.array([1, 1, 1, 2], pa.int32()),
        "item_id": pa.array([7, 7, 8, 9], pa.int32()),
        "timestamp_ms": [5000, 5000, 6000, 7000],
        "is_click": zero,
        "long_view": [1, 1, 0, 1],
        "is_like": zero,
        "is_follow": zero,
        "is_comment": zero,
        "is_forward": [0, 0, 1, 0],
        "is_hate": zero,
        "play_time_ms": [10, 10, 20, 30],
        "duration_ms": [0, 0, 100, 100],
        "tab": [1, 1, 1, 1],
    }
    pq.write_table(pa.table(rows), folder / "interactions.parquet")
    pq.write_table(
        pa.table(
            {
                "user_id": [1],
                "last_timestamp_ms": [4000],
                "item_ids": [[9, 8, 7]],
                "long_view": [[1, 0, 1]],
                "is_like": [[0, 0, 1]],
            }
        ),
        folder / "train_history.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "item_id": [7, 8, 9],
                "author_id": [70, 80, 90],
                "tag": ["3,5", None, "4"],
                "video_duration": [87_433.0, None, 1000.0],
            }
        ),
        folder / "items.parquet",
    )
    return folder


def test_kuairand_layout(tmp_path: Path) -> None:
    with open_log(kuairand(tmp_path)) as log:
        assert log.kind == "kuairand"
        assert log.describe().startswith(f"kuairand log at {tmp_path}")
        assert log.found == {
            "full rows": 3,
            "exact repeats dropped": 1,
            "earlier exposures": 3,
            "items": 3,
        }
        rows = log.interactions.order_by(["user_id", "timestamp"]).to_pyarrow().to_pylist()
        seen = [
            (r["user_id"], r["item_id"], r["timestamp"], r["long_view"], r["like"], r["share"])
            for r in rows
        ]
        assert seen == [
            (1, 9, 3998, 1, 0, None),
            (1, 8, 3999, 0, 0, None),
            (1, 7, 4000, 1, 1, None),
            (1, 7, 5000, 1, 0, 0),
            (1, 8, 6000, 0, 0, 1),
            (2, 9, 7000, 1, 0, 0),
        ]
        assert [r["duration_ms"] for r in rows] == [None, None, None, None, 100, 100]
        assert log.items["text"].to_pylist() == [
            "tag 3,5 · author 70 · 87 s",
            "tag ? · author 80 · length unknown",
            "tag 4 · author 90 · 1 s",
        ]
        assert log.items["tags"].to_pylist() == [["3", "5"], [], ["4"]]


def test_kuairand_history_lists_of_other_lengths(tmp_path: Path) -> None:
    kuairand(tmp_path)
    history = pq.read_table(tmp_path / "train_history.parquet")
    history = history.set_column(3, "long_view", pa.array([[1, 0]]))
    pq.write_table(history, tmp_path / "train_history.parquet")
    with pytest.raises(DataError, match=r"train_history\.parquet, row 0: .* other lengths"):
        open_log(tmp_path)


def test_kuairand_names_its_own_columns(tmp_path: Path) -> None:
    kuairand(tmp_path)
    table = pq.read_table(tmp_path / "interactions.parquet")
    table = table.set_column(table.column_names.index("is_like"), "is_like", pa.array([0, 5, 0, 0]))
    pq.write_table(table, tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=r"column 'is_like', row 1: wanted .* 0/1 .* got 5"):
        open_log(tmp_path)


@pytest.mark.data
def test_kuairand_subset_without_items_and_history(data_dir: Path) -> None:
    folder = data_dir / "kuairand_27k_like_hate_subset"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    with open_log(folder) as log:
        assert log.kind == "kuairand"
        assert log.time == "ms"
        assert log.found["full rows"] + log.found["exact repeats dropped"] == 41_828
        assert log.items.num_rows == 9_359


def test_connections_close_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with open_log(tmp_path) as log:
            spill = Path(log.connection.scratch)
            assert spill.is_dir()
        assert not spill.exists()
