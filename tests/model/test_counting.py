"""Counting rankers against plain loops over tiny logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onerec.model.counting as counting
from onerec.errors import DataError
from onerec.model.counting import (
    CountRanker,
    ItemLists,
    co_consumption,
    personal_frequency,
    popularity,
    transition,
)

N = 30


def log(seed: int = 0, users: int = 40) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Sequences of 0 to 20 items, repeats included: flat, offsets, lists."""
    rng = np.random.default_rng(seed)
    rows = [rng.zipf(1.5, size=rng.integers(0, 21)) % N for _ in range(users)]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return np.concatenate(rows), offsets, [r.tolist() for r in rows]


def dense(lists: ItemLists) -> np.ndarray:
    matrix = np.zeros((len(lists), len(lists)))
    for item in range(len(lists)):
        neighbors, weights = lists.of(item)
        assert len(set(neighbors.tolist())) == len(neighbors)
        matrix[item, neighbors] = weights
    return matrix


def plain_transition(rows: list[list[int]], window: int, shrink: float) -> np.ndarray:
    counts = np.zeros((N, N))
    for row in rows:
        for i, a in enumerate(row):
            for j in range(i + 1, min(i + window + 1, len(row))):
                counts[a, row[j]] += 1 / (j - i)
    return counts / (counts.sum(axis=1, keepdims=True) + shrink)


def plain_cosine(rows: list[list[int]], window: int, exponent: float) -> np.ndarray:
    counts, seen = np.zeros((N, N)), np.zeros(N)
    for row in rows:
        for i, a in enumerate(row):
            seen[a] += 1
            for j, b in enumerate(row):
                counts[a, b] += a != b and abs(i - j) <= window
    norm = np.maximum(seen, 1) ** exponent
    return counts / norm[:, None] / norm[None]


@pytest.mark.parametrize("window", [1, 5, 15])
def test_transition_against_loops(window: int) -> None:
    items, offsets, rows = log()
    part = transition(items, offsets, N, window=window, last=3, shrink=2.5)
    np.testing.assert_allclose(dense(part.lists), plain_transition(rows, window, 2.5), rtol=1e-6)
    np.testing.assert_allclose(part.recency, [1, 1 / 2, 1 / 3])


@pytest.mark.parametrize(("window", "exponent"), [(1, 0.5), (10, 0.3), (15, 0.0)])
def test_co_consumption_against_loops(window: int, exponent: float) -> None:
    items, offsets, rows = log(1)
    part = co_consumption(items, offsets, N, window=window, exponent=exponent, last=4, decay=0.5)
    want = plain_cosine(rows, window, exponent)
    np.testing.assert_allclose(dense(part.lists), want, rtol=1e-6)
    assert want.trace() == 0
    np.testing.assert_allclose(part.recency, [1, 0.5, 0.25, 0.125])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    items, offsets, rows = log(2)
    counts = np.bincount(items, minlength=N)

    def made() -> tuple[CountRanker, np.ndarray, np.ndarray]:
        ranker = CountRanker(
            [transition(items, offsets, N), co_consumption(items, offsets, N), popularity(counts)],
            counts,
            [1.0, 0.3, 0.1],
        )
        return ranker, *ranker.score(rows, 12, rows)

    whole, best, scores = made()
    monkeypatch.setattr(counting, "_PAIRS", 1)
    monkeypatch.setattr(counting, "_CELLS", 3 * N)
    again, same, same_scores = made()
    for one, other in zip(whole.parts, again.parts, strict=True):
        np.testing.assert_array_equal(one.lists.offsets, other.lists.offsets)
        np.testing.assert_array_equal(one.lists.items, other.lists.items)
        np.testing.assert_array_equal(one.lists.weights, other.lists.weights)
    np.testing.assert_array_equal(best, same)
    np.testing.assert_array_equal(scores, same_scores)


def test_the_best_neighbors_are_kept() -> None:
    items, offsets, rows = log(3)
    cut = co_consumption(items, offsets, N, neighbors=3).lists
    want = plain_cosine(rows, 10, 0.5)
    for item in range(N):
        neighbors, weights = cut.of(item)
        assert len(neighbors) == min(3, (want[item] > 0).sum())
        np.testing.assert_allclose(weights, np.sort(want[item])[::-1][: len(weights)], rtol=1e-6)
        np.testing.assert_allclose(want[item, neighbors], weights, rtol=1e-6)
    # Transition counts all followers in an item's total, and keeps the best.
    chain = transition(items, offsets, N, neighbors=3).lists
    want = plain_transition(rows, 5, 10.0)
    for item in range(N):
        np.testing.assert_allclose(want[item, chain.of(item)[0]], chain.of(item)[1], rtol=1e-6)


def plain_mixture(
    rows: list[list[int]], counts: np.ndarray, history: list[int], weights: tuple[float, ...]
) -> np.ndarray:
    """Scores [N] of transition, co-consumption, what was taken before and popularity."""
    chain, cosine = plain_transition(rows, 5, 10.0), plain_cosine(rows, 10, 0.5)
    parts = np.zeros((4, N))
    for age, item in enumerate(history[::-1]):
        parts[0] += chain[item] / (age + 1) if age < 5 else 0
        parts[1] += cosine[item] * 0.8**age if age < 50 else 0
        parts[2, item] += 0.9**age
    parts[3] = counts
    spread = parts.std(axis=1, keepdims=True)
    return (np.array(weights)[:, None] * parts / np.where(spread > 0, spread, 1)).sum(axis=0)


@pytest.mark.parametrize("masked", [True, False])
def test_mixture_against_loops(masked: bool) -> None:
    items, offsets, rows = log(4, users=60)
    counts = np.bincount(items, minlength=N)
    weights = (1.0, 0.7, 0.4, 0.2)
    ranker = CountRanker(
        [
            transition(items, offsets, N),
            co_consumption(items, offsets, N),
            personal_frequency(N, decay=0.9),
            popularity(counts),
        ],
        counts,
        weights,
    )
    best, scores = ranker.score(rows, N, rows if masked else None)
    for history, found, found_scores in zip(rows, best, scores, strict=True):
        want = plain_mixture(rows, counts, history, weights)
        free = [i for i in range(N) if not (masked and i in history)]
        assert sorted(found[found >= 0]) == free
        assert (found_scores[found < 0] == -np.inf).all()
        np.testing.assert_allclose(found_scores[: len(free)], want[found[: len(free)]], rtol=1e-5)
        assert (np.diff(found_scores[: len(free)]) <= 0).all()
    np.testing.assert_array_equal(ranker.rank(rows, 7), ranker.score(rows, 7)[0])


def test_no_evidence_is_popularity_and_equal_scores_are_too() -> None:
    # 0 -> 1 and 0 -> 2 equally often; 2 is more popular. 3 and 4 are known by popularity only.
    rows = [[0, 1], [0, 2], [2], [3], [3], [3], [4], [4]]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    items = np.concatenate(rows)
    counts = np.bincount(items, minlength=6)
    ranker = CountRanker([transition(items, offsets, 6)], counts)
    best, scores = ranker.score([[0], [], [5, 0]], 6, [[0], [], [5, 0]])
    assert best[0, :4].tolist() == [2, 1, 3, 4]
    assert scores[0, 0] == scores[0, 1] > 0
    assert scores[0, 2:5].tolist() == [0, 0, 0]
    assert best[0, 4] == 5
    assert best[0, 5] == -1
    assert scores[0, 5] == -np.inf
    assert best[1, 0] == 3
    assert set(best[1, 1:4]) == {0, 2, 4}
    assert best[2].tolist() == [2, 1, 3, 4, -1, -1]
    found, values = ranker.candidates([[0], []], 4)
    assert found.tolist() == [[2, 1, -1, -1], [-1] * 4]
    assert np.isneginf(values).tolist() == [[False, False, True, True], [True] * 4]


def test_equal_scores_do_not_follow_the_index() -> None:
    """The index of an item may tell when it first occurred, so it must not order ties."""
    ranker = CountRanker([popularity(np.zeros(1000))], np.zeros(1000))
    order = ranker.rank([[]], 1000)[0]
    assert sorted(order) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    rows = [[0, i] for i in range(1, 1000)]
    offsets = np.arange(0, 2 * len(rows) + 1, 2)
    kept = transition(np.concatenate(rows), offsets, 1000, neighbors=100).lists.of(0)[0]
    assert 400 < kept.mean() < 600


def test_personal_frequency_counts_and_prefers_the_recent() -> None:
    ranker = CountRanker([personal_frequency(5, decay=1.0)], np.zeros(5))
    assert ranker.rank([[3, 1, 1, 0]], 1).tolist() == [[1]]
    recent = CountRanker([personal_frequency(5, decay=0.5)], np.zeros(5))
    assert recent.rank([[1, 1, 3, 0]], 3).tolist() == [[0, 3, 1]]


def test_save_and_load(tmp_path: Path) -> None:
    items, offsets, rows = log(5)
    counts = np.bincount(items, minlength=N)
    ranker = CountRanker(
        [transition(items, offsets, N), popularity(counts, neighbors=4)], counts, [0.25, 1.0]
    )
    ranker.save(tmp_path / "counts.npz")
    loaded = CountRanker.load(tmp_path / "counts.npz")
    assert loaded.weights == (0.25, 1.0)
    for one, other in zip(ranker.score(rows, 9, rows), loaded.score(rows, 9, rows), strict=True):
        np.testing.assert_array_equal(one, other)
    content = (tmp_path / "counts.npz").read_bytes()
    ranker.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == content

    (tmp_path / "cut.npz").write_bytes(content[:-200])
    with pytest.raises(DataError, match=r"cut\.npz: not a count ranker"):
        CountRanker.load(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", format=99)
    with pytest.raises(DataError, match="wanted format 2, got 99"):
        CountRanker.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        CountRanker.load(tmp_path / "none.npz")


def test_more_items_behind_change_no_order_of_a_part() -> None:
    items, offsets, rows = log()
    parts = [transition(items, offsets, N), co_consumption(items, offsets, N)]
    counts = np.bincount(items, minlength=N)
    parts += [popularity(counts), personal_frequency(N)]
    ranker = CountRanker(parts, counts, [0.0, 1.0, 0.0, 0.0])
    grown = ranker.grown(N + 4)
    assert grown.n_items == N + 4
    np.testing.assert_array_equal(grown.rank(rows[:10], 12), ranker.rank(rows[:10], 12))
    assert grown.rank([[N + 3]], 3).shape == (1, 3)
    with pytest.raises(ValueError, match=f"n_items: wanted at least {N}, got 3"):
        ranker.grown(3)


def test_zero_weights_leave_parts_out() -> None:
    items, offsets, rows = log(6)
    counts = np.bincount(items, minlength=N)
    follow, together = transition(items, offsets, N), co_consumption(items, offsets, N)
    both = CountRanker([follow, together], counts)
    only = both.with_weights([0.0, 2.0])
    assert len(only.parts) == 1
    np.testing.assert_array_equal(only.rank(rows, 5), CountRanker([together], counts).rank(rows, 5))


def test_mistakes_are_named() -> None:
    items, offsets, rows = log()
    counts = np.zeros(N)
    part = transition(items, offsets, N)
    ranker = CountRanker([part], counts)
    for call, message in {
        lambda: transition(items, offsets, 3): r"sequences: wanted items in 0..2, got 0\.\.",
        lambda: transition(items, offsets[:-1], N): "offsets: wanted 0",
        lambda: transition(items, offsets, N, window=16): "window: wanted 1..15, got 16",
        lambda: transition(items, offsets, N, neighbors=0): "neighbors: wanted >= 1, got 0",
        lambda: co_consumption(items, offsets, N, decay=0.0): r"decay: wanted .*, got 0.0",
        lambda: CountRanker([], counts): "weights: wanted one for each of 0 parts",
        lambda: CountRanker([part], counts, [1, 2]): "each of 1 parts .*got 2",
        lambda: CountRanker([part], counts, [-1]): "weights: wanted values >= 0",
        lambda: CountRanker([part], np.zeros(4)): f"parts: wanted lists of 4 items, got {N}",
        lambda: ranker.score([[N]], 5): f"items: wanted indices in 0..{N - 1}",
        lambda: ranker.score(rows, 0): "k: wanted >= 1, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_an_empty_log_has_no_evidence() -> None:
    part = co_consumption([], [0], 4)
    ranker = CountRanker([part, popularity(np.zeros(4))], [0, 3, 0, 1])
    assert ranker.candidates([[2]], 2)[0].tolist() == [[-1, -1]]
    assert ranker.rank([[2]], 2).tolist() == [[1, 3]]
    assert ranker.score([], 3)[0].shape == (0, 3)
