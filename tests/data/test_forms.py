"""Every form in which people have logs is read as the same log."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from onerec.data import open_log
from onerec.errors import DataError

N = 60
START = 1_700_000_000_000
USERS = [n % 4 + 1 for n in range(N)]
ITEMS = [n * 7 % 9 + 1 for n in range(N)]
TIMES = [START + n * 3_600_000 for n in range(N)]
DATES = [str(np.datetime64(t, "ms").astype("datetime64[D]")) for t in TIMES]
EXPECTED = sorted(zip(USERS, ITEMS, TIMES, strict=True))
TEXTS = {n: f"Café {n}, “x” (1995)" for n in range(1, 10)}
PLAIN = {n: text.replace("“", '"').replace("”", '"') for n, text in TEXTS.items()}  # Latin-1
SECONDS = [t // 1000 for t in TIMES]
ISO = [str(np.datetime64(t, "ms")) + "Z" for t in TIMES]


def log(**columns: Any) -> pa.Table:
    base = {"user_id": USERS, "item_id": ITEMS, "timestamp": TIMES}
    return pa.table({k: v for k, v in (base | columns).items() if v is not None})


def items(**columns: Any) -> pa.Table:
    return pa.table({"item_id": [*TEXTS], "text": [*TEXTS.values()], **columns})


def lines(path: Path, rows: list[str], encoding: str = "utf-8") -> Path:
    text = "".join(f"{row}\n" for row in rows).encode(encoding)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def csv(path: Path, table: pa.Table, delimiter: str = ",") -> Path:
    def cell(value: Any) -> str:
        word = "" if value is None else str(value)
        return '"' + word.replace('"', '""') + '"' if delimiter in word or '"' in word else word

    rows = [table.column_names, *([cell(v) for v in row.values()] for row in table.to_pylist())]
    return lines(path, [delimiter.join(row) for row in rows])


def jsonl(path: Path, table: pa.Table) -> Path:
    return lines(path, [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()])


def parts(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(3):
        part = log().slice(number * 20, 20)
        pq.write_table(part, folder / f"part-{number:05d}-ab.snappy.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def hive(folder: Path) -> Path:
    ds.write_dataset(
        log(dt=DATES), folder, format="parquet", partitioning=["dt"], partitioning_flavor="hive"
    )
    return folder


def beside(folder: Path) -> Path:
    pq.write_table(items(), folder / "items.parquet")
    return folder


def recbole(folder: Path) -> Path:
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    lines(
        folder / "set.inter",
        ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        + [f"{u}\t{i}\t4.0\t{t // 1000}" for u, i, t in rows],
    )
    lines(
        folder / "set.item",
        ["item_id:token\tmovie_title:token_seq\tclass:token_seq"]
        + [f"{i}\t{text}\tDrama Action" for i, text in TEXTS.items()],
    )
    return folder


def movielens(folder: Path, ratings: str, delimiter: str) -> Path:
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    lines(folder / ratings, [delimiter.join(map(str, (u, i, 3, t // 1000))) for u, i, t in rows])
    if ratings == "u.data":
        tail = "|".join(["01-Jan-1995", "", "http://x", *["0", "1"], *["0"] * 17])
        about = [f"{i}|{text}|{tail}" for i, text in TEXTS.items()]
        lines(
            folder / "u.item", [row.replace("“", '"').replace("”", '"') for row in about], "latin-1"
        )
    else:
        about = [f"{i}::{text}::Drama|War" for i, text in TEXTS.items()]
        lines(
            folder / "movies.dat",
            [row.replace("“", '"').replace("”", '"') for row in about],
            "latin-1",
        )
    return folder


def movielens_latest(folder: Path) -> Path:
    csv(
        folder / "ratings.csv",
        pa.table(
            {
                "userId": USERS,
                "movieId": ITEMS,
                "rating": [3.5] * N,
                "timestamp": [t // 1000 for t in TIMES],
            }
        ),
    )
    csv(
        folder / "movies.csv",
        pa.table({"movieId": [*TEXTS], "title": [*TEXTS.values()], "genres": ["Drama|War"] * 9}),
    )
    return folder


SIMPLE: dict[str, Callable[[Path], Any]] = {
    "a Parquet file": lambda f: (
        (pq.write_table(log(), f / "interactions.parquet"), beside(f))[0]
        or f / "interactions.parquet"
    ),
    "a Parquet file of another name": lambda f: (
        pq.write_table(log(), f / "log.parquet") or f / "log.parquet"
    ),
    "a folder": lambda f: pq.write_table(log(), f / "interactions.parquet") or beside(f),
    "parts as Spark writes them": lambda f: parts(f / "interactions.parquet") and beside(f),
    "a folder of parts": lambda f: parts(f / "spark"),
    "a hive folder": lambda f: hive(f / "hive"),
    "a hive folder in a folder": lambda f: hive(f / "interactions") and beside(f),
    "a glob": lambda f: str(parts(f / "spark") / "part-*.parquet"),
    "a glob of hive folders": lambda f: str(hive(f / "hive") / "dt=*" / "*.parquet"),
    "CSV": lambda f: csv(f / "interactions.csv", log()) and csv(f / "items.csv", items()) and f,
    "CSV, packed": lambda f: csv(f / "interactions.csv.gz", log()) and f,
    "one CSV file": lambda f: csv(f / "log.csv", log()),
    "tabs": lambda f: csv(f / "interactions.tsv", log(), "\t") and f,
    "JSON lines": lambda f: (
        jsonl(f / "interactions.jsonl", log()) and jsonl(f / "items.jsonl", items()) and f
    ),
    "JSON lines, packed": lambda f: jsonl(f / "interactions.jsonl.gz", log()) and f,
    "a folder of CSV files": lambda f: (
        csv(f / "a.csv", log().slice(0, 30)) and csv(f / "b.csv", log().slice(30)) and f
    ),
    "RecBole": recbole,
    "MovieLens-100k": lambda f: movielens(f, "u.data", "\t"),
    "MovieLens-1M": lambda f: movielens(f, "ratings.dat", "::"),
    "MovieLens, latest": movielens_latest,
    "an Arrow table": lambda f: log(),
    "pandas": lambda f: log().to_pandas(),
    "polars": lambda f: pytest.importorskip("polars").from_arrow(log()),
}


@pytest.mark.parametrize("make", SIMPLE.values(), ids=SIMPLE.keys())
def test_every_form_is_the_same_log(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    with open_log(make(tmp_path)) as source:
        found = source.interactions.order_by("row").to_pyarrow().to_pylist()
        assert sorted((r["user_id"], r["item_id"], r["timestamp"]) for r in found) == EXPECTED
        assert source.items["item_id"].to_pylist() == [*TEXTS]
        if "items" in {path.name.split(".")[0] for path in tmp_path.iterdir()}:
            assert source.items["text"].to_pylist() == [*TEXTS.values()]
        if source.kind == "movielens":
            assert source.items["text"].to_pylist() in ([*PLAIN.values()], [*TEXTS.values()])
            assert source.items["tags"][0].as_py() in (["Drama", "War"], ["Action"])
        if source.kind == "recbole":
            assert source.items["text"].to_pylist() == [*TEXTS.values()]
            assert source.items["tags"][0].as_py() == ["Drama", "Action"]


def asin(item: int) -> str:
    return f"00000000{item:02d}"


def amazon_2014(folder: Path) -> Path:
    lines(
        folder / "reviews_Beauty_5.json.gz",
        [
            json.dumps(
                {
                    "reviewerID": f"A{u:012d}",
                    "asin": asin(i),
                    "overall": 5.0,
                    "unixReviewTime": t // 1000,
                    "reviewText": "fine",
                }
            )
            for u, i, t in zip(USERS, ITEMS, TIMES, strict=True)
        ],
    )
    lines(
        folder / "meta_Beauty.json.gz",
        [
            str({"asin": asin(i), "title": text, "categories": [["Beauty", "Skin"]]})
            for i, text in TEXTS.items()
        ],
    )
    return folder


def amazon_2018(folder: Path) -> Path:
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    return lines(
        folder / "All_Beauty.csv", [f"{asin(i)},A{u:012d},5.0,{t // 1000}" for u, i, t in rows]
    )


def amazon_ratings_2014(folder: Path) -> Path:
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    lines(
        folder / "ratings_Beauty.csv", [f"A{u:012d},{asin(i)},5.0,{t // 1000}" for u, i, t in rows]
    )
    return folder


def amazon_2023(folder: Path) -> Path:
    lines(
        folder / "All_Beauty.jsonl.gz",
        [
            json.dumps(
                {"rating": 5.0, "user_id": f"A{u:012d}", "parent_asin": asin(i), "timestamp": t}
            )
            for u, i, t in zip(USERS, ITEMS, TIMES, strict=True)
        ],
    )
    lines(
        folder / "meta_All_Beauty.jsonl.gz",
        [
            json.dumps({"parent_asin": asin(i), "title": text, "categories": ["Beauty", "Skin"]})
            for i, text in TEXTS.items()
        ],
    )
    return folder


@pytest.mark.parametrize(
    "make", [amazon_2014, amazon_ratings_2014, amazon_2018, amazon_2023], ids=lambda f: f.__name__
)
def test_amazon_as_it_is_published(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with open_log(make(tmp_path)) as source:
        assert source.kind == "amazon-reviews"
        rows = source.interactions.to_pyarrow().to_pylist()
        found = sorted((r["user_id"], r["item_id"], r["timestamp"]) for r in rows)
        assert found == [(f"A{u:012d}", asin(i), t) for u, i, t in EXPECTED]
        if list(tmp_path.glob("meta*")):
            assert sorted(source.items["text"].to_pylist()) == sorted(TEXTS.values())
            assert source.items["tags"][0].as_py() == ["Beauty", "Skin"]
        assert any("rating" in note for note in source.notes)


def test_kuairand_as_it_is_published(tmp_path: Path) -> None:
    flags = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"]
    table = pa.table(
        {
            "user_id": USERS,
            "video_id": ITEMS,
            "date": [20220408] * N,
            "time_ms": TIMES,
            **{flag: [n % 2 for n in range(N)] for flag in flags},
            "play_time_ms": [1000] * N,
            "duration_ms": [2000] * N,
            "tab": [1] * N,
        }
    )
    folder = tmp_path / "data"
    folder.mkdir()
    csv(folder / "log_standard_4_08_to_4_21_pure.csv", table.slice(0, 30))
    csv(folder / "log_standard_4_22_to_5_08_pure.csv", table.slice(30))
    csv(folder / "log_random_4_22_to_5_08_pure.csv", table)
    about = {"video_id": [*TEXTS], "author_id": [5] * 9, "video_duration": [2000.0] * 9}
    csv(folder / "video_features_basic_pure.csv", pa.table(about | {"tag": ["1,2"] * 9}))
    with open_log(tmp_path) as source:
        assert source.kind == "kuairand"
        assert source.found["full rows"] == N
        rows = source.interactions.to_pyarrow().to_pylist()
        assert sorted((r["user_id"], r["item_id"], r["timestamp"]) for r in rows) == EXPECTED
        assert sum(r["like"] for r in rows) == N // 2
        assert source.items["text"][0].as_py() == "tag 1,2 · author 5 · 2 s"
        assert source.items["tags"][0].as_py() == ["1", "2"]


@pytest.mark.parametrize(
    "name", ["like=1", "user_id=5", "watch_time_ms=0/log", "timestamp=2024-01-01"]
)
def test_names_of_folders_change_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    pq.write_table(log(like=[0] * N, watch_time_ms=[5] * N), folder / "interactions.parquet")
    for path in (folder, folder / "interactions.parquet", str(folder / "*.parquet")):
        with open_log(path) as source:
            rows = source.interactions.to_pyarrow()
            assert sorted(rows["user_id"].to_pylist()) == sorted(USERS)
            assert set(rows["like"].to_pylist()) == {0}
            assert set(rows["watch_time_ms"].to_pylist()) == {5}


def test_hive_keys_are_columns_of_a_hive_folder_but_never_of_a_file(tmp_path: Path) -> None:
    for split, begin, end in (("train", 0, 40), ("valid", 40, 50), ("test", 50, 60)):
        for user in ("1", "2"):  # the files have user ids of their own
            folder = tmp_path / "log" / f"split={split}" / f"user_id={user}"
            folder.mkdir(parents=True)
            part = log().slice(begin, end - begin)
            part = part.filter(
                pa.array([u % 2 == int(user) % 2 for u in part["user_id"].to_pylist()])
            )
            pq.write_table(part, folder / "a.parquet")
    with open_log(tmp_path / "log") as source:
        rows = source.interactions.to_pyarrow().to_pylist()
        assert sorted((r["user_id"], r["item_id"], r["timestamp"]) for r in rows) == EXPECTED
        by_time = {r["timestamp"]: r["split"] for r in rows}
        assert [by_time[t] for t in TIMES] == ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
        assert source.default_split == "column"


@pytest.mark.parametrize("twin", ["Like", "Watch_Time_ms", "USER_ID", "Timestamp", "filename"])
@pytest.mark.parametrize("first", [True, False])
def test_names_that_differ_in_case_are_other_columns(
    tmp_path: Path, twin: str, first: bool
) -> None:
    table = log(like=[1] * N, watch_time_ms=[7] * N)
    table = table.add_column(0 if first else table.num_columns, twin, pa.array(["x"] * N))
    about = items(tags=["a"] * 9).add_column(0, "Tags", pa.array(["x"] * 9))
    pq.write_table(table, tmp_path / "interactions.parquet")
    pq.write_table(about, tmp_path / "items.parquet")
    with open_log(tmp_path) as source:
        rows = source.interactions.to_pyarrow()
        assert sorted(rows["user_id"].to_pylist()) == sorted(USERS)
        assert set(rows["like"].to_pylist()) == {1}
        assert set(rows["watch_time_ms"].to_pylist()) == {7}
        assert source.items["tags"].to_pylist() == [["a"]] * 9
        assert f"not read: {twin}" in source.notes[0]


def test_a_name_twice_and_the_engines_own_name(tmp_path: Path) -> None:
    pq.write_table(
        log().append_column("user_id", pa.array(USERS)), tmp_path / "interactions.parquet"
    )
    with pytest.raises(DataError, match=r"column 'user_id': the column is there twice"):
        open_log(tmp_path)
    pq.write_table(log(File_Row_Number=USERS), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=r"column 'File_Row_Number': the engine's own name"):
        open_log(tmp_path)


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", SECONDS),
        ("s", [float(t) for t in SECONDS]),
        ("ms", TIMES),
        ("us", [t * 1000 for t in TIMES]),
        ("ns", [t * 1_000_000 for t in TIMES]),
        ("iso", ISO),
    ],
    ids=["s", "s as floats", "ms", "us", "ns", "iso"],
)
def test_named_units(tmp_path: Path, unit: str, values: list[Any]) -> None:
    for write in (pq.write_table, lambda table, path: csv(path.with_suffix(".csv"), table)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write(log(timestamp=values), folder / "interactions.parquet")
        with open_log(folder, columns={"timestamp_unit": unit}) as source:
            rows = source.interactions.order_by("row").to_pyarrow()
            assert rows["timestamp"].to_pylist() == TIMES
    with pytest.raises(
        ValueError, match="timestamp_unit: wanted one of s, ms, us, ns, iso, got 'h'"
    ):
        open_log(folder, columns={"timestamp_unit": "h"})


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        (SECONDS, None, r"row 0: wanted times from 1990 .* --columns\.timestamp_unit s$"),
        ([t * 1000 for t in TIMES], None, r"--columns\.timestamp_unit us$"),
        ([t * 10**6 for t in TIMES], None, r"--columns\.timestamp_unit ns$"),
        (TIMES, "s", r"in seconds since 1970, got 17\d+; as milliseconds .*timestamp_unit ms$"),
        ([t // 86_400_000 for t in TIMES], None, r"they look like days since 1970"),
        ([*TIMES[:-1], 0], None, r"row 59: wanted times from 1990 .* got 0$"),
        ([*TIMES[:-1], 4 * START], None, r"row 59: wanted times .* got 68"),
        ([*ISO[:-1], "noon"], "iso", r"row 59: wanted ISO times .* got 'noon'"),
        (SECONDS, "iso", r"wanted ISO times \(strings\), got int64"),
        (ISO, "ms", r"wanted numbers \(milliseconds\), got string"),
        (
            pa.array([9_400_000_000_000_000, *TIMES[1:]]).cast(pa.timestamp("ms")),
            None,
            r"row 0: wanted times from 1990 to a year from now, got",
        ),
        (pa.array(SECONDS).cast(pa.timestamp("ms")), None, r"row 0: .* got 1970-01-20"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_times_of_another_unit_are_refused(
    tmp_path: Path, values: Any, unit: str | None, message: str
) -> None:
    pq.write_table(log(timestamp=values), tmp_path / "interactions.parquet")
    columns = {"timestamp_unit": unit} if unit else None
    with pytest.raises(DataError, match=f"column 'timestamp'.*{message}"):
        open_log(tmp_path, columns=columns)


@pytest.mark.parametrize("value", [2**64 - 1, 1e19, 2**63 - 1, 10**12 + 1])
@pytest.mark.parametrize("column", ["watch_time_ms", "duration_ms", "items"])
def test_huge_numbers_are_told_with_their_row(tmp_path: Path, value: Any, column: str) -> None:
    n = 9 if column == "items" else N
    type_ = pa.float64() if isinstance(value, float) else pa.uint64()
    numbers = pa.array([*[5] * (n - 2), value, 5], type_)
    main = log() if column == "items" else log(**{column: numbers})
    pq.write_table(main, tmp_path / "interactions.parquet")
    if column == "items":
        pq.write_table(items(duration_ms=numbers), tmp_path / "items.parquet")
    told = rf"row {n - 2}: wanted numbers of 0 or more and at most 10\^12"
    with pytest.raises(DataError, match=told):
        open_log(tmp_path)


def test_null_tags_and_nul_characters(tmp_path: Path) -> None:
    tags = pa.array([["a", None], None, [None], ["b"], *[[]] * 5], pa.list_(pa.string()))
    users = [f"u\0{user}" for user in USERS]
    pq.write_table(log(user_id=users), tmp_path / "interactions.parquet")
    pq.write_table(items(tags=tags), tmp_path / "items.parquet")
    with open_log(tmp_path) as source:
        assert source.items["tags"].to_pylist() == [["a"], [], [], ["b"], *[[]] * 5]
        assert set(source.interactions.to_pyarrow()["user_id"].to_pylist()) == set(users)


def test_a_bad_row_is_told_with_its_own_file(tmp_path: Path) -> None:
    folder = parts(tmp_path / "interactions.parquet")
    part = folder / "part-00001-ab.snappy.parquet"
    table = pq.read_table(part)
    table = table.set_column(0, "user_id", pa.array([None, *table["user_id"].to_pylist()[1:]]))
    pq.write_table(table, part)
    with pytest.raises(
        DataError, match=r"part-00001-ab\.snappy\.parquet, column 'user_id', row 0:"
    ):
        open_log(tmp_path)
    csv(tmp_path / "log.csv", log(watch_time_ms=["5"] * 17 + ["soon"] + ["6"] * (N - 18)))
    with pytest.raises(DataError, match=r"log\.csv, column 'watch_time_ms', row 17: .* got 'soon'"):
        open_log(tmp_path / "log.csv")
    shutil.copy(part, folder / "part-9.csv")
    with pytest.raises(DataError, match="wanted files of one format"):
        open_log(tmp_path / "interactions.parquet")


def test_ids_of_text_stay_what_they_are(tmp_path: Path) -> None:
    """ "007" is no integer, and two ids never become one."""
    names = [f"{n % 3:03d}" for n in range(N)]
    csv(tmp_path / "log.csv", log(item_id=names))
    with open_log(tmp_path / "log.csv") as source:
        assert source.items["item_id"].to_pylist() == ["000", "001", "002"]


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    table = log(event_type=["view"] * N, price=[9.99] * N, watch_time=[3] * N, liked=[1] * N)
    pq.write_table(table, tmp_path / "interactions.parquet")
    with open_log(tmp_path) as source:
        assert source.notes == [
            "not read: event_type, price, watch_time, liked; no feedback column: every row counts "
            "as taken; watch_time: did you mean watch_time_ms? "
            "(--columns.watch_time_ms watch_time); liked: did you mean like? (--columns.like liked)"
        ]
    with open_log(tmp_path, columns={"watch_time_ms": "watch_time", "like": "liked"}) as source:
        assert source.notes == ["not read: event_type, price"]


def test_a_frame_with_items_and_other_things(tmp_path: Path) -> None:
    with open_log(log(), items=items()) as source:
        assert source.items["text"].to_pylist() == [*TEXTS.values()]
    with pytest.raises(TypeError, match=r"wanted a path, or a DataFrame .*, got list"):
        open_log([1, 2])
    pq.write_table(log(), tmp_path / "interactions.parquet")
    with pytest.raises(ValueError, match="items: they lie beside the log"):
        open_log(tmp_path, items=items())
