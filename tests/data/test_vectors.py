"""Co-occurrence vectors and the rule that fills missing ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from onerec.data.vectors import _pairs, cooccurrence, fill, fold_in


def cooccurrence_vectors(*log: Any, **options: Any) -> tuple[Any, Any]:
    """The vectors, and which items had a pair."""
    found = cooccurrence(*log, **options)
    return found.vectors, found.known


def sequences(rng: np.random.Generator, groups: int, users: int, length: int) -> np.ndarray:
    """Users each stay within one group of ten items."""
    group = rng.integers(0, groups, users)
    return (group[:, None] * 10 + rng.integers(0, 10, (users, length))).astype(np.int32)


def brute_force_pairs(rows: list[list[int]], window: int) -> dict[tuple[int, int], float]:
    weights: dict[tuple[int, int], float] = {}
    for row in rows:
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if 0 < abs(i - j) <= window and a != b:
                    weights[a, b] = weights.get((a, b), 0.0) + 1 / abs(i - j)
    return weights


@pytest.mark.parametrize("window", [1, 3, 50])
def test_pair_weights_equal_brute_force(window: int) -> None:
    rng = np.random.default_rng(window)
    rows = [rng.integers(0, 8, n).tolist() for n in (0, 1, 2, 7, 12, 0, 5)]
    values = np.array([x for row in rows for x in row], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    left, right, weight = _pairs(values, offsets, 8, window)
    wanted = brute_force_pairs(rows, window)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == sorted(wanted)
    np.testing.assert_allclose(weight, [wanted[pair] for pair in sorted(wanted)], rtol=1e-12)


def test_vectors_are_the_leading_eigenvectors_of_ppmi() -> None:
    rng = np.random.default_rng(0)
    rows = sequences(rng, groups=6, users=300, length=8)
    offsets = np.arange(0, rows.size + 1, 8)
    vectors, known = cooccurrence_vectors(rows.ravel(), offsets, 60, dim=12, window=4)
    assert known.all()
    left, right, weight = _pairs(rows.ravel(), offsets, 60, 4)
    counts = np.zeros((60, 60))
    counts[left, right] = weight
    context = counts.sum(axis=1) ** 0.75
    context /= context.sum()
    with np.errstate(divide="ignore"):
        pmi = np.log(counts / (counts.sum(axis=1)[:, None] * context))
    ppmi = np.maximum(0.5 * (pmi + pmi.T), 0)
    values, eigenvectors = eigsh(ppmi, k=12, which="LM")
    # The columns' squared norms are the |eigenvalues|, largest first, and they span nearly the
    # same space: a randomised method may trade a little with the eigenvalues below the cut.
    norms = (vectors.astype(np.float64) ** 2).sum(axis=0)
    np.testing.assert_allclose(norms, np.sort(np.abs(values))[::-1], rtol=0.02)
    unit = vectors / np.sqrt(norms)
    np.testing.assert_allclose(unit.T @ unit, np.eye(12), atol=1e-4)
    assert np.linalg.norm(eigenvectors.T @ unit, axis=0)[:6].min() > 0.99


def test_groups_that_are_seen_together_lie_together() -> None:
    rng = np.random.default_rng(1)
    rows = sequences(rng, groups=5, users=400, length=10)
    vectors, _ = cooccurrence_vectors(
        rows.ravel(), np.arange(0, rows.size + 1, 10), 50, dim=8, window=5
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    same = np.equal.outer(np.arange(50) // 10, np.arange(50) // 10)
    assert cosine[same].min() > cosine[~same].max() + 0.3


def test_equal_seeds_give_equal_vectors_and_unseen_items_none() -> None:
    rng = np.random.default_rng(2)
    rows = sequences(rng, groups=3, users=50, length=6)
    offsets = np.arange(0, rows.size + 1, 6)
    a, known = cooccurrence_vectors(rows.ravel(), offsets, 40, dim=5, seed=3)
    b, _ = cooccurrence_vectors(rows.ravel(), offsets, 40, dim=5, seed=3)
    np.testing.assert_array_equal(a, b)
    assert known.tolist() == [True] * 30 + [False] * 10
    assert (a[30:] == 0).all()
    assert np.isfinite(a).all()


def test_a_twin_that_comes_later_is_folded_in_beside_its_twin() -> None:
    """Items whose neighbors are those of old items get vectors in the old ones' direction."""
    rng = np.random.default_rng(5)
    rows = sequences(rng, groups=5, users=400, length=10)
    offsets = np.arange(0, rows.size + 1, 10)
    old = cooccurrence(rows.ravel(), offsets, 50, dim=8)
    later = rows[:120].copy()
    twins = {3: 50, 17: 51, 42: 52}
    for item, twin in twins.items():
        later[later == item] = twin
    flat, at = later.ravel(), np.arange(0, later.size + 1, 10)
    vectors, known = fold_in(flat, at, 54, old.projection, old.context)
    assert known.tolist() == [True, True, True, False]
    assert not vectors[3].any()
    unit = old.vectors / np.linalg.norm(old.vectors, axis=1, keepdims=True)
    for row, item in enumerate(twins):
        cosine = unit @ vectors[row] / np.linalg.norm(vectors[row])
        group = np.arange(50) // 10 == item // 10
        assert cosine[group].min() > cosine[~group].max()
    # The projection takes a row of the matrix that was factored to that item's vector.
    left, right, weight = _pairs(rows.ravel(), offsets, 50, 5)
    marginal = np.bincount(left, weights=weight)
    pmi = np.full((50, 50), -np.inf)
    pmi[left, right] = np.log(weight / (marginal[left] * old.context[right]))
    made = np.maximum(0.5 * (pmi + pmi.T), 0) @ old.projection
    np.testing.assert_allclose(made, old.vectors, atol=0.05 * np.abs(old.vectors).max())


@pytest.mark.parametrize("values", [[], [4], [4, 4, 4]], ids=["nothing", "one item", "one kind"])
def test_no_pairs(values: list[int]) -> None:
    vectors, known = cooccurrence_vectors(
        np.array(values, dtype=np.int32), np.array([0, len(values)]), 6, dim=4
    )
    assert vectors.shape == (6, 4)
    assert not vectors.any()
    assert not known.any()


def test_fill_takes_the_mean_of_the_tag() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((9, 200)).astype(np.float32)
    known = np.array([True, True, True, True, False, False, False, False, False])
    tags = ["a", "a", "b", None, "a", "b", "c", None, None]
    wanted = {4: vectors[:2].mean(axis=0), 5: vectors[2]}
    everything = vectors[:4].mean(axis=0)
    given = vectors.copy()
    given[~known] = np.nan
    filled = fill(given.copy(), known, tags, seed=0)
    np.testing.assert_array_equal(filled[known], vectors[known])
    spread = vectors[:4].std(axis=0)
    for row in range(4, 9):
        noise = (filled[row] - wanted.get(row, everything)) / (0.1 * spread)
        # 200 normal draws: mean within 4 standard errors, spread near 1.
        assert abs(noise.mean()) < 4 / np.sqrt(200)
        assert 0.8 < noise.std() < 1.2
    np.testing.assert_array_equal(filled, fill(given.copy(), known, tags, seed=0))


def test_fill_needs_one_vector() -> None:
    with pytest.raises(ValueError, match="at least one item with a vector"):
        fill(np.zeros((2, 3), dtype=np.float32), np.zeros(2, dtype=bool), [None, None], 0)
