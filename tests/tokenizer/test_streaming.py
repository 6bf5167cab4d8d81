"""Vectors in files: mapped, copied, fitted with little memory, interrupted and gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from onerec.errors import DataError
from onerec.tokenizer import BalancedKMeans, ResidualQuantizer, open_rows


def vectors(n: int = 3001, d: int = 10) -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    means = generator.standard_normal((9, d))
    noise = 0.4 * generator.standard_normal((n, d))
    return (means[generator.integers(0, 9, n)] + noise).astype(np.float32)


def parquet(path: Path, x: NDArray[np.float32]) -> Path:
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"embedding": column}), path, row_group_size=1000)
    return path


def test_files_are_mapped_or_copied_once(tmp_path: Path) -> None:
    x = vectors()
    np.save(tmp_path / "plain.npy", x)
    np.save(tmp_path / "half.npy", x.astype(np.float16))
    np.save(tmp_path / "columns.npy", np.asfortranarray(x))
    parquet(tmp_path / "items.parquet", x)
    assert np.array_equal(open_rows(tmp_path / "plain.npy"), x)
    assert isinstance(open_rows(tmp_path / "plain.npy"), np.memmap)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen: list[tuple[int, int, str]] = []
    for name in ("half.npy", "columns.npy", "items.parquet"):
        seen.clear()
        found = open_rows(tmp_path / name, scratch=scratch, progress=lambda *now: seen.append(now))
        assert isinstance(found, np.memmap)
        assert found.dtype == np.float32
        assert np.array_equal(found, x.astype(np.float16) if name == "half.npy" else x)
        assert seen[-1][:2] == (len(x), len(x))
        open_rows(tmp_path / name, scratch=scratch, progress=lambda *_: pytest.fail("again"))
    assert len(list(scratch.iterdir())) == 3


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(3))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    pq.write_table(pa.table({"embedding": [[1.0], [2.0]]}), tmp_path / "lists.parquet")
    holes = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"embedding": holes}), tmp_path / "holes.parquet")
    for name, message in [
        ("missing.npy", r"missing\.npy: wanted an array of numbers, got .*No such file"),
        ("broken.npy", r"broken\.npy: wanted an array"),
        ("flat.npy", r"wanted numbers of shape \[n, d\], got float64 \[3\]"),
        ("vectors.csv", r"wanted a \.npy or \.parquet file"),
        ("lists.parquet", "column embedding: wanted a fixed-size list"),
        ("holes.parquet", "column embedding, row 1: wanted a vector, got null"),
    ]:
        with pytest.raises(DataError, match=message):
            open_rows(tmp_path / name)


def test_a_mapped_file_gives_what_memory_gives(tmp_path: Path) -> None:
    x = vectors()
    np.save(tmp_path / "x.npy", x)
    settings = {"max_iter": 3, "random_state": 0, "num_threads": 1, "distinct": "cap"}
    want = ResidualQuantizer(2, 64, **settings).fit(x)
    mapped = open_rows(tmp_path / "x.npy")
    steps: list[tuple[int, int]] = []
    got = ResidualQuantizer(2, 64, **settings).fit(
        mapped,
        scratch=tmp_path / "scratch",
        progress=lambda done, total, _: steps.append((done, total)),
    )
    assert np.array_equal(got.sids_, want.sids_)
    assert got.report_ == want.report_
    assert np.array_equal(got.encode(mapped), want.encode(x))
    assert steps[-1] == (6, 6)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert np.array_equal(mapped, x)


def test_a_file_larger_than_the_memory_budget(tmp_path: Path) -> None:
    n, d, clusters = 20_000, 96, 128
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    budget = 5 << 20
    assert budget < (tmp_path / "x.npy").stat().st_size
    kmeans = BalancedKMeans(
        clusters, max_iter=2, random_state=0, num_threads=1, memory_budget=budget
    ).fit(open_rows(tmp_path / "x.npy"))
    assert kmeans.gap_ <= 1e-6
    assert set(np.bincount(kmeans.labels_)) == {n // clusters, n // clusters + 1}


class Stop(Exception):
    pass


def test_an_interrupted_fit_goes_on_to_the_same_result(tmp_path: Path) -> None:
    x = vectors()
    settings = {"max_iter": 4, "tol": 0, "num_threads": 1}
    want = BalancedKMeans(24, random_state=5, **settings).fit(x)

    def stop_after_two(steps: int, total: int, note: str) -> None:
        if steps == 2:
            raise Stop

    path = tmp_path / "kmeans.npz"
    with pytest.raises(Stop):
        BalancedKMeans(24, random_state=5, **settings).fit(
            x, checkpoint=path, progress=stop_after_two
        )
    seen: list[int] = []
    got = BalancedKMeans(24, random_state=5, **settings).fit(
        x, checkpoint=path, progress=lambda steps, *_: seen.append(steps)
    )
    assert seen == [3, 4]
    assert got.n_iter_ == want.n_iter_
    assert np.array_equal(got.labels_, want.labels_)
    assert np.array_equal(got.prices_, want.prices_)
    with pytest.raises(DataError, match="n_clusters: wanted a checkpoint for 25, got 24"):
        BalancedKMeans(25, random_state=5, **settings).fit(x, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"kmeans\.npz: wanted a checkpoint"):
        BalancedKMeans(24, random_state=5, **settings).fit(x, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint: wanted None"):
        BalancedKMeans(24, method="sequential").fit(x, checkpoint=path)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_an_interrupted_quantizer_goes_on_to_the_same_ids(tmp_path: Path, stop_at: int) -> None:
    x = vectors(1200)

    def quantizer() -> ResidualQuantizer:
        return ResidualQuantizer(
            3, 16, max_iter=2, random_state=1, num_threads=1, distinct="distinct"
        )

    def stop(done: int, total: int, note: str) -> None:
        if done == stop_at:
            raise Stop

    folder = tmp_path / "state"
    with pytest.raises(Stop):
        quantizer().fit(x, checkpoint=folder, progress=stop)
    got, want = quantizer().fit(x, checkpoint=folder), quantizer().fit(x)
    assert np.array_equal(got.sids_, want.sids_)
    assert got.report_ == want.report_
    other = ResidualQuantizer(3, 16, max_iter=2, random_state=2, distinct="distinct")
    with pytest.raises(DataError, match="seed: wanted a checkpoint for"):
        other.fit(x, checkpoint=folder)
