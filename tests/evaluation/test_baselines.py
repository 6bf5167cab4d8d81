"""The baselines' rankings and their expected metrics."""

from __future__ import annotations

import numpy as np
import pytest

from onerec.evaluation.baselines import Popularity, Random
from onerec.evaluation.metrics import hit_rate, pad_rows, recall, target_ranks


def test_popularity_ranks_by_count_without_the_excluded() -> None:
    ranker = Popularity([5, 9, 1, 7, 0])
    none: list[int] = []
    np.testing.assert_array_equal(ranker.rank([none, none], 3), [[1, 3, 0]] * 2)
    got = ranker.rank([none] * 3, 3, exclude=[[3, 3], [], [4, 2, 0]])
    np.testing.assert_array_equal(got, [[1, 0, 2], [1, 3, 0], [1, 3, -1]])
    assert ranker.rank([none], 7).tolist() == [[1, 3, 0, 2, 4, -1, -1]]


def test_popularity_shows_ties_in_a_seeded_order_and_groups_them() -> None:
    counts = np.repeat([4, 2, 0], [1, 30, 9])
    first, again, other = Popularity(counts), Popularity(counts), Popularity(counts, seed=1)
    ranked = first.rank([[]], 40)
    np.testing.assert_array_equal(ranked, again.rank([[]], 40))
    assert not np.array_equal(ranked, other.rank([[]], 40))
    assert not np.array_equal(ranked[0, 1:31], np.arange(1, 31))
    assert ranked[0, 0] == 0
    assert set(ranked[0, 1:31]) == set(range(1, 31))
    # 4 places for 30 equal items: each has 4/30, whichever of them the shuffle shows.
    ranks = target_ranks(first.rank([[]], 5), [[17]], groups=first.groups)
    assert recall(ranks, 5)[0] == pytest.approx(4 / 30)


def test_popularity_expectation_is_the_mean_over_shuffles() -> None:
    counts = np.array([3, 3, 3, 8, 1, 1])
    exclude, targets = [[0]], [[1, 5]]
    expected = np.mean(
        [
            recall(target_ranks(Popularity(counts, seed=s).rank([[]], 4, exclude), targets), 4)
            for s in range(400)
        ]
    )
    one = Popularity(counts)
    ranks = target_ranks(one.rank([[]], 4, exclude), targets, groups=one.groups, exclude=exclude)
    assert recall(ranks, 4)[0] == pytest.approx(0.75)  # item 1 surely, item 5 every other time
    assert expected == pytest.approx(0.75, abs=0.05)


def test_random_is_uniform_distinct_and_respects_exclusions() -> None:
    ranker = Random(8, seed=3)
    rows = ranker.rank([[]] * 4000, 3, exclude=[[2, 5]] * 4000)
    assert not np.isin(rows, [2, 5, -1]).any()
    assert all(len(set(row)) == 3 for row in rows[:200].tolist())
    for place in range(3):
        share = np.bincount(rows[:, place], minlength=8) / 4000
        np.testing.assert_allclose(share[[0, 1, 3, 4, 6, 7]], 1 / 6, atol=0.03)
    np.testing.assert_array_equal(np.sort(ranker.rank([[]], 9))[0], [-1, *range(8)])


def test_random_metrics_are_expectations() -> None:
    ranker = Random(100)
    targets, exclude = pad_rows([[7, 40]]), pad_rows([range(20, 30)])
    ranks = target_ranks(
        ranker.rank([[]], 9, exclude), targets, groups=ranker.groups, exclude=exclude
    )
    assert recall(ranks, 9)[0] == pytest.approx(9 / 90)
    assert hit_rate(ranks, 9)[0] == pytest.approx(1 - (81 / 90) * (80 / 89))
