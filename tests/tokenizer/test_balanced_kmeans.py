"""Balanced k-means against optimal transport, its own certificate and plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from onerec._native import core
from onerec.tokenizer import BalancedKMeans, reference
from onerec.tokenizer.balanced_kmeans import priced_argmin


def optimal_cost(x: NDArray[np.float32], centers: NDArray[np.float32]) -> float:
    """Cheapest assignment to sizes floor/ceil of N/K: one column a place, dummies on spare ones."""
    costs = reference.squared_distances(x, centers)
    n, clusters = costs.shape
    low, rest = divmod(n, clusters)
    places = low + (rest > 0)
    full = np.repeat(costs, places, axis=1)
    if rest:
        dummies = np.full((clusters - rest, clusters * places), costs.max() * n + 1)
        dummies[:, places - 1 :: places] = 0
        full = np.vstack([full, dummies])
    rows, columns = linear_sum_assignment(full)
    return float(full[rows, columns].sum())


def blobs(n: int, d: int, seed: int = 0, spread: float = 0.5) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, 31)
    means = generator.standard_normal((30, d))
    which = generator.choice(30, n, p=share / share.sum())
    return (means[which] + spread * generator.standard_normal((n, d))).astype(np.float32)


def duplicated(n: int, d: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(1)
    return generator.standard_normal((5, d)).astype(np.float32)[generator.integers(0, 5, n)]


def half_equal(n: int, d: int) -> NDArray[np.float32]:
    x = blobs(n, d)
    x[: n // 2] = 0
    return x


def collinear(n: int, d: int) -> NDArray[np.float32]:
    return np.outer(np.arange(n) % 37, np.ones(d)).astype(np.float32)


def far_from_origin(n: int, d: int) -> NDArray[np.float32]:
    return blobs(n, d) + np.float32(1000)


def tight_blobs(n: int, d: int) -> NDArray[np.float32]:
    return blobs(n, d, spread=1e-4)


def grid(n: int, d: int) -> NDArray[np.float32]:
    return np.random.default_rng(2).integers(0, 3, (n, d)).astype(np.float32)


HOSTILE = [blobs, duplicated, half_equal, collinear, far_from_origin, tight_blobs, grid]


def check(x: NDArray[np.float32], kmeans: BalancedKMeans) -> None:
    """Everything that a fit promises."""
    n, clusters = len(x), kmeans.n_clusters
    low, rest = divmod(n, clusters)
    sizes = np.bincount(kmeans.labels_, minlength=clusters)
    assert sorted(sizes) == [low] * (clusters - rest) + [low + 1] * rest
    assert np.array_equal(sizes, kmeans.sizes_)
    cost = reference.assignment_cost(x, kmeans.cluster_centers_, kmeans.labels_)
    assert kmeans.inertia_ == pytest.approx(cost, rel=1e-12)
    bound = reference.dual_value(x, kmeans.cluster_centers_, kmeans.prices_)
    scale = max(cost, 1e-9 * float((x.astype(np.float64) ** 2).sum()))
    assert cost - bound <= 1e-6 * scale
    assert kmeans.gap_ <= 1e-6 or cost - bound <= 1e-9 * scale
    assert kmeans.prices_.mean() == pytest.approx(
        0, abs=1e-9 * max(1, np.abs(kmeans.prices_).max())
    )


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize(
    ("n", "clusters"), [(1, 1), (33, 1), (33, 33), (200, 7), (203, 64), (512, 16)]
)
def test_priced_is_optimal(make, n: int, clusters: int) -> None:
    x = make(n, 9)
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=3, num_threads=1).fit(x)
    check(x, kmeans)
    best = optimal_cost(x, kmeans.cluster_centers_)
    assert kmeans.inertia_ == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 90),
    clusters=st.integers(1, 90),
    d=st.integers(1, 5),
    values=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_ragged_sizes_on_a_coarse_grid(
    n: int, clusters: int, d: int, values: int, seed: int
) -> None:
    clusters = min(n, clusters)
    x = np.random.default_rng(seed).integers(0, values, (n, d)).astype(np.float32)
    kmeans = BalancedKMeans(clusters, random_state=seed, max_iter=2, num_threads=1).fit(x)
    check(x, kmeans)
    best = optimal_cost(x, kmeans.cluster_centers_)
    assert kmeans.inertia_ == pytest.approx(best, rel=1e-6, abs=1e-9)


def real_vectors(data_dir: Path, name: str) -> NDArray[np.float32]:
    if name == "kuairand_pure":
        x = np.load(data_dir / name / "item_embeddings_graph64.npz")["vectors"]
    else:
        x = np.load(data_dir / name / "item_embeddings_minilm.npy")
    return x.astype(np.float32)


REAL = pytest.mark.parametrize(
    "name", ["amazon2014_beauty", "kuairand_pure", "minionerec_industrial"]
)


@pytest.mark.data
@REAL
def test_certificate_on_real_vectors(data_dir: Path, name: str) -> None:
    x = real_vectors(data_dir, name)[:3000]
    kmeans = BalancedKMeans(64, random_state=0, max_iter=2, num_threads=1).fit(x)
    check(x, kmeans)
    assert (kmeans.predict(x) == kmeans.labels_).mean() >= 0.995


@pytest.mark.data
@REAL
@pytest.mark.parametrize(("n", "clusters"), [(300, 1), (150, 150), (700, 24)])
def test_optimal_transport_on_real_vectors(
    data_dir: Path, name: str, n: int, clusters: int
) -> None:
    x = real_vectors(data_dir, name)
    x = x[np.random.default_rng(3).choice(len(x), n, replace=False)]
    x[n // 2 : n // 2 + 5] = x[0]  # items that are equal
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=2, num_threads=1).fit(x)
    check(x, kmeans)
    best = optimal_cost(x, kmeans.cluster_centers_)
    assert kmeans.inertia_ == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.data
@REAL
def test_a_flow_solver_finds_nothing_cheaper(data_dir: Path, name: str) -> None:
    flow = pytest.importorskip("ortools.graph.python.min_cost_flow")
    n, clusters = 2000, 30
    x = real_vectors(data_dir, name)[:n]
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=2, num_threads=1).fit(x)
    costs = reference.squared_distances(x, kmeans.cluster_centers_)
    unit = costs.max() / 2**40  # the solver works on integers
    solver = flow.SimpleMinCostFlow()
    item, cluster = np.divmod(np.arange(n * clusters), clusters)
    solver.add_arcs_with_capacity_and_unit_cost(
        item,
        n + cluster,
        np.ones(n * clusters, np.int64),
        np.rint(costs / unit).ravel().astype(int),
    )
    # Every cluster keeps floor(n / clusters); of the rest it passes on at most one.
    low, rest = divmod(n, clusters)
    sink = np.full(clusters, n + clusters)
    one = np.ones(clusters, np.int64)
    solver.add_arcs_with_capacity_and_unit_cost(n + np.arange(clusters), sink, one, 0 * one)
    supplies = np.r_[np.ones(n, np.int64), -low * one, -rest]
    solver.set_nodes_supplies(np.arange(len(supplies)), supplies)
    assert solver.solve() == solver.OPTIMAL
    assert kmeans.inertia_ == pytest.approx(solver.optimal_cost() * unit, rel=1e-8)


# Larger than what is solved on a matrix of all costs: candidate lists, and moves that they know.
LONG = [(20_000, 256, 6), (21_111, 256, 6), (12_001, 400, 3)]


@pytest.mark.parametrize("make", [blobs, duplicated, collinear])
@pytest.mark.parametrize(("n", "clusters", "d"), LONG[1:])
def test_lists_are_certified(make, n: int, clusters: int, d: int) -> None:
    x = make(n, d)
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=2, num_threads=1).fit(x)
    check(x, kmeans)
    assert len(np.unique(x, axis=0)) < n or (kmeans.predict(x) == kmeans.labels_).mean() >= 0.995


@pytest.mark.gpu
@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize(
    ("n", "clusters", "d"), [(1, 1, 9), (33, 33, 9), (203, 64, 9), (5000, 130, 37)]
)
def test_cuda_is_certified(make, n: int, clusters: int, d: int) -> None:
    x = make(n, d)
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=2, device="cuda").fit(x)
    check(x, kmeans)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "clusters", "d"), [*LONG, (1000, 130, 200)])
def test_cuda_gives_what_the_cpu_gives(n: int, clusters: int, d: int) -> None:
    x = blobs(n, d)
    kmeans = BalancedKMeans(clusters, random_state=0, max_iter=3).fit(x)
    there = [
        BalancedKMeans(clusters, random_state=0, max_iter=3, **more).fit(data)
        for data, more in [(x, {"device": "cuda"}), (torch.from_numpy(x).cuda(), {})]
    ]
    for other in there:
        assert np.array_equal(other.labels_, kmeans.labels_)
        assert np.array_equal(other.cluster_centers_, kmeans.cluster_centers_)
        assert np.array_equal(other.prices_, there[0].prices_)
        assert other.gap_ <= 1e-6
    assert np.array_equal(
        there[0].predict(x), priced_argmin(x, kmeans.cluster_centers_, there[0].prices_)
    )


def test_each_step_lowers_the_inertia() -> None:
    x = blobs(2000, 16)
    inertia = [
        BalancedKMeans(32, random_state=3, max_iter=steps, tol=0, num_threads=1).fit(x).inertia_
        for steps in range(1, 6)
    ]
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[-1] < inertia[0]


@pytest.mark.parametrize("method", ["priced", "sequential"])
def test_same_result_for_every_number_of_threads_and_on_repeat(method) -> None:
    x = blobs(5003, 24)
    first = BalancedKMeans(40, method=method, random_state=1, max_iter=4, num_threads=1).fit(x)
    for threads in (1, 2):
        again = BalancedKMeans(
            40, method=method, random_state=1, max_iter=4, num_threads=threads
        ).fit(x)
        assert np.array_equal(first.labels_, again.labels_)
        assert np.array_equal(first.cluster_centers_, again.cluster_centers_)
        assert np.array_equal(first.prices_, again.prices_)
    other = BalancedKMeans(40, method=method, random_state=2, max_iter=4, num_threads=1).fit(x)
    assert not np.array_equal(first.labels_, other.labels_)


@pytest.mark.parametrize("make", [blobs, duplicated, collinear, grid])
@pytest.mark.parametrize(("n", "clusters"), [(1, 1), (50, 50), (203, 7), (600, 64)])
def test_sequential_is_algorithm_1(make, n: int, clusters: int) -> None:
    x = make(n, 5)
    start = x[np.random.default_rng(0).permutation(n)[:clusters]]
    kmeans = BalancedKMeans(
        clusters, method="sequential", init=start, max_iter=2, num_threads=1
    ).fit(x)
    centers = start
    for _ in range(kmeans.n_iter_):
        labels = reference.sequential_round(x, centers)
        centers = reference.cluster_means(x, labels, clusters).astype(np.float32)
    assert np.array_equal(kmeans.labels_, labels)
    np.testing.assert_allclose(kmeans.cluster_centers_, centers, rtol=1e-6, atol=1e-6)
    assert np.isnan(kmeans.gap_)


def test_a_step_from_given_labels_needs_the_simplex_alone() -> None:
    n, clusters, d = 140_000, 32, 4  # more costs than are kept at once, clusters of thousands
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    fitted = BalancedKMeans(clusters, max_iter=2, random_state=0).fit(x)
    centers = np.stack([x[fitted.labels_ == k].mean(axis=0) for k in range(clusters)])
    found = []
    for with_labels in (False, True):
        labels, prices = fitted.labels_.copy(), fitted.prices_.copy()
        work = core().balanced_assign(
            x=x.ctypes.data,
            rows=n,
            columns=d,
            stride=d,
            centers=centers.ctypes.data,
            clusters=clusters,
            seed=0,
            num_threads=2,
            memory_budget=1 << 30,
            prices_given=True,
            prices=prices.ctypes.data,
            labels=labels.ctypes.data,
            labels_given=with_labels,
        )
        found.append((work["moves"], work["cost"], work["gap"]))
    (searched, cost, gap), (moves, same, exact) = found
    assert searched > 0
    assert moves == 0
    assert same == pytest.approx(cost, rel=1e-12)
    assert max(abs(gap), abs(exact)) < 1e-9


def test_predict_is_the_priced_argmin() -> None:
    x, new = blobs(700, 12), blobs(301, 12, seed=9)
    kmeans = BalancedKMeans(20, random_state=0, max_iter=3, num_threads=1).fit(x)
    want = reference.priced_argmin(new, kmeans.cluster_centers_, kmeans.prices_)
    assert np.array_equal(kmeans.predict(new), want)
    assert kmeans.predict(new).dtype == np.int32
    assert kmeans.predict(new[:0]).shape == (0,)
    assert np.array_equal(kmeans.predict(x), kmeans.labels_)


def test_rows_may_be_strided_wider_or_from_torch() -> None:
    import torch

    x = blobs(300, 8)
    want = BalancedKMeans(8, random_state=0, num_threads=1).fit(x).labels_
    wide = np.zeros((300, 20), np.float32)
    wide[:, 3:11] = x
    for same in (wide[:, 3:11], x.astype(np.float64), np.asfortranarray(x), torch.from_numpy(x)):
        got = BalancedKMeans(8, random_state=0, num_threads=1).fit(same).labels_
        assert np.array_equal(got, want)


def broken(value: float) -> NDArray[np.float32]:
    x = blobs(40, 3)
    x[17, 2] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "x", "message"),
    [
        ({}, broken(np.nan), "x: wanted finite values, got nan in row 17, column 2"),
        ({}, broken(-np.inf), "x: wanted finite values, got -inf in row 17, column 2"),
        ({}, broken(1e19), "x: wanted values of size 1e15 at most, got 9999999"),
        ({}, blobs(3, 3), "wanted at least n_clusters = 4 rows, got 3"),
        ({}, np.zeros((4, 0)), r"wanted shape \[n, d\] with d >= 1, got \[4, 0\]"),
        ({}, np.zeros(4), r"wanted shape \[n, d\] with d >= 1, got \[4\]"),
        ({"n_clusters": 0}, blobs(9, 3), "n_clusters: wanted at least 1, got 0"),
        ({"max_iter": 0}, blobs(9, 3), "max_iter: wanted at least 1, got 0"),
        ({"tol": float("nan")}, blobs(9, 3), "tol: wanted a number of at least 0, got nan"),
        ({"method": "best"}, blobs(9, 3), 'method: wanted "priced" or "sequential"'),
        ({"init": np.zeros((4, 2))}, blobs(9, 3), r"init: wanted shape \[4, 3\], got \[4, 2\]"),
        ({"init": "best"}, blobs(9, 3), 'init: wanted "random" or an array'),
        ({"init": broken(np.nan)[14:18]}, blobs(9, 3), "centers: wanted finite values, got nan"),
        ({"memory_budget": 1000}, blobs(9, 3), "memory_budget: wanted at least"),
        ({"device": "meta"}, blobs(9, 3), "device: wanted a CPU or a CUDA device, got 'meta'"),
        ({"device": "cuda:99"}, blobs(9, 3), "cuda_device: wanted one of .* devices, got 99"),
    ],
)
def test_mistakes_are_named(arguments, x, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedKMeans(**{"n_clusters": 4, **arguments}).fit(x)


def test_more_mistakes() -> None:
    with pytest.raises(TypeError, match="wanted numbers, got dtype"):
        BalancedKMeans(2).fit([["a"], ["b"]])
    with pytest.raises(TypeError, match="n_clusters: wanted an integer"):
        BalancedKMeans(2.5).fit(blobs(9, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample_weight: not supported"):
        BalancedKMeans(2).fit(blobs(9, 3), sample_weight=np.ones(9))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="call fit first"):
        BalancedKMeans(2).predict(blobs(9, 3))
    kmeans = BalancedKMeans(2, random_state=0).fit(blobs(9, 3))
    with pytest.raises(ValueError, match="X: wanted 3 columns, got 4"):
        kmeans.predict(blobs(9, 4))
    with pytest.raises(ValueError, match="x: wanted finite values"):
        kmeans.predict(broken(np.nan))
    with pytest.raises(ValueError, match="x: wanted values of size 1e15 at most"):
        kmeans.predict(broken(-1e30))


def test_parameters_as_scikit_learn_wants_them() -> None:
    kmeans = BalancedKMeans(5, method="sequential", random_state=7)
    again = BalancedKMeans(**kmeans.get_params()).set_params(max_iter=2)
    assert (again.method, again.random_state, again.max_iter) == ("sequential", 7, 2)
    with pytest.raises(ValueError, match="depth: not a parameter"):
        kmeans.set_params(depth=3)
