"""Sessions built by Spark are those that DuckDB builds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import SessionConfig, SimulatorConfig, build_sessions, open_log, simulate
from onerec.errors import DataError

pytestmark = [
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
    pytest.mark.filterwarnings("ignore"),  # pyspark's own
]


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="the extra spark is not installed")
    settings = {
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "3",
        "spark.log.level": "OFF",
    }
    made = sql.SparkSession.builder.master("local[1]").config(map=settings).getOrCreate()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spark") / "world"
    config = SimulatorConfig(n_users=40, n_items=60, n_creators=10, requests_per_user=6, seed=1)
    simulate(config).write(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        SessionConfig(length=3),
        SessionConfig(length=3, rule="next"),
        SessionConfig(length=3, rule="gap", split="last"),
    ],
    ids=["request", "next", "gap-last"],
)
def test_equals_duckdb(session: Any, world: Path, config: SessionConfig, tmp_path: Path) -> None:
    for engine in ("duckdb", "spark"):
        with open_log(world, engine=engine) as log:
            build_sessions(log, config, tmp_path / engine)
    for name in ("items", "sequences", "sessions", "exposed"):
        expected, got = (
            pq.read_table(tmp_path / engine / f"{name}.parquet") for engine in ("duckdb", "spark")
        )
        assert got.to_pylist() == expected.to_pylist(), name
        assert got.schema.names == expected.schema.names
        kinds = [
            [str(t).replace(" not null", "") for t in s.types]
            for s in (got.schema, expected.schema)
        ]
        assert kinds[0] == kinds[1]
    vectors = [
        (tmp_path / engine / "embeddings.npy").read_bytes() for engine in ("duckdb", "spark")
    ]
    assert vectors[0] == vectors[1]


def test_own_names_times_and_tags_equal_duckdb(session: Any, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(world / "embeddings.npy", folder)
    log = pq.read_table(world / "interactions.parquet")
    at = log.schema.get_field_index("timestamp")
    # A time without a zone is UTC, whatever the zone of Spark's session.
    shown = log["timestamp"].cast(pa.timestamp("ms")).cast(pa.timestamp("us"))
    log = log.set_column(at, "shown_at", shown)
    own = {"user_id": "uid", "item_id": "video"}
    pq.write_table(log.rename_columns(own), folder / "interactions.parquet")
    items = pq.read_table(world / "items.parquet").rename_columns({"item_id": "video"})
    genre = pa.array([None if n % 7 == 0 else f"genre {n % 3}" for n in range(items.num_rows)])
    pq.write_table(items.append_column("genre", genre), folder / "items.parquet")
    columns = {**own, "timestamp": "shown_at", "items.item_id": "video", "items.tags": "genre"}
    for name, path, given, engine in (
        ("plain", world, {}, "duckdb"),
        ("duckdb", folder, columns, "duckdb"),
        ("spark", folder, columns, "spark"),
    ):
        with open_log(path, columns=given, engine=engine) as source:
            build_sessions(source, SessionConfig(length=3, rule="next"), tmp_path / name)
    plain, duckdb, spark = (
        {
            name: pq.read_table(tmp_path / engine / f"{name}.parquet").to_pylist()
            for name in ("items", "sequences", "sessions", "exposed")
        }
        for engine in ("plain", "duckdb", "spark")
    )
    assert spark == duckdb
    assert [row["tags"] for row in spark["items"][:3]] == [[], ["genre 1"], ["genre 2"]]
    assert {**spark, "items": 0} == {**plain, "items": 0}


def test_bad_values_are_told(session: Any, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "bad")
    table = pq.read_table(world / "interactions.parquet")
    at = table.schema.get_field_index("like")
    likes = table["like"].to_pylist()
    likes[7] = 3
    pq.write_table(table.set_column(at, "like", [likes]), tmp_path / "bad" / "interactions.parquet")
    with pytest.raises(DataError, match=r"column 'like', row 7: wanted .*, got 3"):
        open_log(tmp_path / "bad", engine="spark")
