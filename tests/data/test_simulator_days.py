"""A world whose items come and go and whose interests drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from onerec.data import SimulatorConfig
from onerec.data.simulator.days import ChangingWorld, Churn

CONFIG = SimulatorConfig(
    n_users=60, n_items=80, n_creators=10, days=4, requests_per_user=12, seed=5
)


@pytest.fixture(scope="module")
def world() -> ChangingWorld:
    return ChangingWorld(CONFIG, Churn(items=0.1, drift=0.3))


def test_items_come_and_go(world: ChangingWorld) -> None:
    assert len(world.item_ids) == 80 + 3 * 8
    for day in range(4):
        alive = set(world.items(day).tolist())
        assert len(alive) == 80
        if day:
            before = set(world.items(day - 1).tolist())
            assert alive - before == set(np.flatnonzero(world.born == day).tolist())
            assert before - alive == set(np.flatnonzero(world.gone == day).tolist())
            assert len(alive - before) == 8


def test_the_log_has_what_there_is_on_its_day_and_nothing_twice(
    world: ChangingWorld, tmp_path: Path
) -> None:
    seen: set[tuple[int, int]] = set()
    for day, folder in enumerate(world.write(tmp_path)):
        log = pq.read_table(folder / "interactions.parquet")
        rows = np.searchsorted(world.item_ids, log["item_id"].to_numpy())
        assert len(rows) > 100
        assert (world.born[rows] <= day).all()
        assert (world.gone[rows] > day).all()
        times = log["timestamp"].to_numpy() - CONFIG.start_ms
        assert ((times >= day * 86_400_000) & (times < (day + 1) * 86_400_000)).all()
        pairs = set(zip(log["user_id"].to_pylist(), log["item_id"].to_pylist(), strict=True))
        assert len(pairs) == log.num_rows
        assert not pairs & seen
        seen |= pairs
        new = pq.read_table(folder / "items.parquet")["item_id"].to_numpy()
        assert new.tolist() == world.item_ids[world.born == day].tolist()
        assert len(np.load(folder / "embeddings.npy")) == len(new)
        removed = (folder / "removed.txt").read_text().split()
        assert [int(word) for word in removed] == world.item_ids[world.gone == day].tolist()


def test_interests_drift_by_as_much_as_they_are_said_to(world: ChangingWorld) -> None:
    first, second = (world.world(day).arrays["user_vectors"] for day in (0, 1))
    cosine = (first * second).sum(axis=1)
    cosine /= np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    assert np.mean(cosine) == pytest.approx(np.sqrt(1 - 0.3**2), abs=0.03)
    steady = ChangingWorld(CONFIG, Churn(items=0.0, drift=0.0))
    np.testing.assert_array_equal(*(steady.world(d).arrays["user_vectors"] for d in (0, 3)))


def test_the_value_of_a_day_is_that_of_its_items(world: ChangingWorld) -> None:
    """An item that is there on two days is worth the same to a user who has not changed."""
    both = np.intersect1d(world.items(0), world.items(3))[:5]
    steady = ChangingWorld(CONFIG, Churn(items=0.1, drift=0.0))
    np.testing.assert_array_equal(steady.items(3), world.items(3))
    values = []
    for day in (0, 3):
        place = np.searchsorted(steady.items(day), both)
        values.append(steady.world(day).expected_watch_time(7, place))
    np.testing.assert_allclose(values[0], values[1])


@pytest.mark.parametrize("wrong", [{"items": 1.0}, {"drift": -0.1}])
def test_wrong_shares_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"wanted a share in \[0, 1\)"):
        Churn(**wrong)
