"""Metrics against enumeration of every order of tied items, and intervals against theory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec.evaluation import metrics as m


def naive(order: list[int], targets: set[int], k: int) -> tuple[float, float, float]:
    """Recall, NDCG and hit of one definite order."""
    hits = [item in targets for item in order[:k]]
    dcg = sum(h / math.log2(r + 2) for r, h in enumerate(hits))
    ideal = sum(1 / math.log2(r + 2) for r in range(min(len(targets), k)))
    return sum(hits) / len(targets), dcg / ideal, float(any(hits))


def all_orders(blocks: list[list[int]]) -> list[list[int]]:
    """Every order of the items that keeps the blocks in turn."""
    return [
        list(itertools.chain.from_iterable(choice))
        for choice in itertools.product(*(itertools.permutations(b) for b in blocks))
    ]


def test_hand_computed_case() -> None:
    ranked = [[4, 2, 7, 1], [0, 1, -1, -1]]
    targets = [[2, 1, 9], [5, -1, -1]]
    ranks = m.target_ranks(ranked, targets)
    np.testing.assert_allclose(m.recall(ranks, 3), [1 / 3, 0.0])
    np.testing.assert_allclose(m.recall(ranks, 4), [2 / 3, 0.0])
    # DCG 1/log2(3) + 1/log2(5); ideal 1 + 1/log2(3) + 1/2.
    expected = (0.6309297535714575 + 0.43067655807339306) / (1 + 0.6309297535714575 + 0.5)
    np.testing.assert_allclose(m.ndcg(ranks, 4), [expected, 0.0])
    np.testing.assert_allclose(m.hit_rate(ranks, 1), [0.0, 0.0])
    np.testing.assert_allclose(m.hit_rate(ranks, 2), [1.0, 0.0])


def test_group_that_is_cut_shares_its_places() -> None:
    # Items 1, 2, 3 share an id; the first place belongs to item 0, so two of the three fit in 3.
    groups = [0, 1, 1, 1, 2]
    ranks = m.target_ranks([[0, 2, 1]], [[3]], groups=groups)
    np.testing.assert_allclose(m.recall(ranks, 3), [2 / 3])
    np.testing.assert_allclose(m.recall(ranks, 2), [1 / 3])
    np.testing.assert_allclose(m.ndcg(ranks, 3), [(1 / math.log2(3) + 1 / 2) / 3])
    hidden = m.target_ranks([[0, 2, 3]], [[3]], groups=groups, exclude=[[1, 1, -1]])
    np.testing.assert_allclose(m.recall(hidden, 3), [1.0])
    np.testing.assert_allclose(m.recall(hidden, 2), [0.5])


def test_excluded_target_is_a_miss_even_when_its_group_is_listed() -> None:
    ranks = m.target_ranks([[0, 1]], [[2, 1]], groups=[0, 1, 1], exclude=[[2]])
    np.testing.assert_allclose(m.target_hits(ranks, 2), [[0.0, 1.0]])
    np.testing.assert_allclose(m.hit_rate(ranks, 2), [1.0])


def test_short_beam_is_a_miss() -> None:
    ranks = m.target_ranks([[3, -1, -1]], [[5]])
    assert m.recall(ranks, 3)[0] == 0.0
    assert m.ndcg(ranks, 3)[0] == 0.0
    empty = m.target_ranks(np.empty((1, 0)), [[5]])
    assert m.hit_rate(empty, 3)[0] == 0.0


def test_row_without_targets_is_nan() -> None:
    ranks = m.target_ranks([[3, 4]], [[-1, -1]])
    assert np.isnan(m.recall(ranks, 2)[0])
    assert np.isnan(m.ndcg(ranks, 2)[0])
    assert np.isnan(m.hit_rate(ranks, 2)[0])


def test_group_in_two_places_is_refused() -> None:
    with pytest.raises(ValueError, match="group 1 in two places"):
        m.target_ranks([[0, 1, 0], [1, 0, 2]], [[0], [0]], groups=[1, 2, 1])


@st.composite
def tied_rankings(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int], int]:
    """Blocks of tied items, targets, excluded items and k."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    items = draw(st.permutations(range(sum(sizes) + 1)))  # one item is never ranked
    blocks, at = [], 0
    for size in sizes:
        blocks.append(list(items[at : at + size]))
        at += size
    targets = draw(st.lists(st.sampled_from(items), min_size=1, max_size=4, unique=True))
    exclude = draw(st.lists(st.sampled_from(items), max_size=2, unique=True))
    return blocks, targets, exclude, draw(st.integers(1, 7))


@given(tied_rankings())
@settings(max_examples=150, deadline=None)
def test_expected_credit_equals_the_mean_over_all_orders(
    case: tuple[list[list[int]], list[int], list[int], int],
) -> None:
    blocks, targets, exclude, k = case
    n = sum(map(len, blocks)) + 1
    groups = np.full(n, len(blocks))
    for g, block in enumerate(blocks):
        groups[block] = g
    left = [[i for i in block if i not in exclude] for block in blocks]
    orders = all_orders(left)
    expected = np.mean([naive(order, set(targets), k) for order in orders], axis=0)
    # The ranker may show any one order, cut anywhere at or past k.
    shown = m.pad_rows([orders[len(orders) // 2]], max(k, 1))
    ranks = m.target_ranks(shown, [targets], groups=groups, exclude=m.pad_rows([exclude]))
    got = [m.recall(ranks, k)[0], m.ndcg(ranks, k)[0], m.hit_rate(ranks, k)[0]]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_batched_rows_equal_single_rows() -> None:
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(50)[:20] for _ in range(31)])
    ranked[::3, 12:] = -1
    targets = np.stack([rng.permutation(50)[:5] for _ in range(31)])
    targets[::2, 3:] = -1
    for k in (1, 7, 20):
        rows = [
            naive([i for i in r if i >= 0], {int(t) for t in ts if t >= 0}, k)
            for r, ts in zip(ranked, targets, strict=True)
        ]
        ranks = m.target_ranks(ranked, targets)
        got = np.stack([m.recall(ranks, k), m.ndcg(ranks, k), m.hit_rate(ranks, k)], axis=1)
        np.testing.assert_allclose(got, rows)


def test_sessions() -> None:
    sessions = [[1, 2, 1, 1], [3, -1, -1, -1], [-1, -1, -1, -1]]
    targets = [[2, 9], [4, 5], [1, -1]]
    np.testing.assert_array_equal(m.session_hits(sessions, targets), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(m.session_recall(sessions, targets), [0.5, 0.0, 0.0])
    np.testing.assert_array_equal(m.session_duplicates(sessions), [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(m.session_lengths(sessions), [4.0, 1.0, 0.0])


def test_exposure_statistics() -> None:
    counts = m.exposure_counts([[0, 1, -1], [0, 0, 2]], 5)
    np.testing.assert_array_equal(counts, [3, 1, 1, 0, 0])
    assert m.coverage(counts) == pytest.approx(0.6)
    assert m.entropy([1, 1, 1, 1]) == pytest.approx(2.0)
    assert m.entropy([7, 0]) == 0.0
    assert m.gini([2, 2, 2]) == pytest.approx(0.0)
    assert m.gini([0, 0, 0, 9]) == pytest.approx(0.75)
    pairs = np.abs(np.subtract.outer(counts, counts)).sum()
    assert m.gini(counts) == pytest.approx(pairs / (2 * 5 * counts.sum()))
    assert math.isnan(m.gini([0, 0]))


def test_popular_share_splits_ties_at_the_cut() -> None:
    exposures = [10, 20, 30, 40]
    assert m.popular_share(exposures, [9, 5, 1, 0], top=0.5) == pytest.approx(0.3)
    # One place is left for two items with 5: each counts half.
    assert m.popular_share(exposures, [9, 5, 5, 0], top=0.5) == pytest.approx(0.1 + 0.25)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        (interval,) = m.bootstrap(rng.exponential(size=80), resamples=300, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    # 95% nominal; the percentile interval of a skewed mean of 80 falls a little short.
    assert 0.90 <= covered / 400 <= 0.975


def test_bootstrap_matches_the_normal_interval() -> None:
    x = np.random.default_rng(2).normal(3.0, 2.0, size=2000)
    (interval,) = m.bootstrap(x, resamples=4000, seed=3)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert interval.value == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.08 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.08 * half)
    assert interval.n == 2000


def test_bootstrap_is_seeded_and_does_not_depend_on_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    first = m.bootstrap(x, resamples=100, seed=5)
    assert m.bootstrap(x, resamples=100, seed=5) == first
    assert m.bootstrap(x, resamples=100, seed=6) != first
    monkeypatch.setattr(m, "_CHUNK_CELLS", 350)
    small = m.bootstrap(x, resamples=100, seed=5)
    for a, b in zip(first, small, strict=True):
        assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_bootstrap_leaves_nan_out_and_takes_weights() -> None:
    x = np.array([[1.0, np.nan], [3.0, np.nan]])
    first, second = m.bootstrap(x, weights=[[3.0, 1.0], [1.0, 1.0]], resamples=50)
    assert first.value == pytest.approx(1.5)
    assert first.n == 4.0
    assert math.isnan(second.value)
    assert math.isnan(second.low)
    assert second.n == 0.0


def test_clusters_widen_the_interval_of_repeated_rows() -> None:
    x = np.random.default_rng(0).normal(size=300)
    repeated, user = np.repeat(x, 4), np.repeat(np.arange(300), 4)
    (single,) = m.bootstrap(x, seed=1)
    (naive_rows,) = m.bootstrap(repeated, seed=1)
    (clustered,) = m.bootstrap(repeated, clusters=user, seed=1)
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low)
    assert naive_rows.high - naive_rows.low < 0.6 * (clustered.high - clustered.low)


def test_paired_bootstrap_is_tighter_than_two_separate_ones() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=500)
    better = base + 0.1 + rng.normal(scale=0.1, size=500)
    (paired,) = m.paired_bootstrap(better, base)
    assert paired.value == pytest.approx((better - base).mean())
    assert paired.low > 0.0
    (alone,) = m.bootstrap(better)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.empty(0)}, "n >= 1"),
        ({"values": np.ones(3), "confidence": 1.0}, "confidence"),
        ({"values": np.ones(3), "resamples": 0}, "resamples"),
        ({"values": np.ones(3), "weights": np.ones(2)}, "weights"),
        ({"values": np.ones(3), "clusters": np.ones(2)}, "clusters"),
    ],
)
def test_bootstrap_refuses_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        m.bootstrap(**arguments)  # type: ignore[arg-type]
