"""Balanced k-means in plain NumPy and float64: what the tests hold the native core against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def squared_distances(x: ArrayLike, centers: ArrayLike) -> NDArray[np.float64]:
    """|x_i - c_k|^2, float64 [N, K], from differences."""
    rows, columns = np.asarray(x, np.float64), np.asarray(centers, np.float64)
    return np.stack([((rows - center) ** 2).sum(1) for center in columns], axis=1)


def priced_argmin(x: ArrayLike, centers: ArrayLike, prices: ArrayLike) -> NDArray[np.int64]:
    """argmin_k |x_i - c_k|^2 + price_k, the first of equals; int64 [N]."""
    total = squared_distances(x, centers) + np.asarray(prices, np.float64)
    labels: NDArray[np.int64] = total.argmin(1)
    return labels


def dual_value(x: ArrayLike, centers: ArrayLike, prices: ArrayLike) -> float:
    """Lower bound that prices give on the cost of every assignment to sizes floor/ceil of N/K.

    sum_i min_k(|x_i - c_k|^2 + p_k) - floor(N/K) sum(p) - (the N mod K largest p).
    """
    costs = squared_distances(x, centers)
    p = np.sort(np.asarray(prices, np.float64))
    low, rest = divmod(costs.shape[0], costs.shape[1])
    bound = (costs + np.asarray(prices, np.float64)).min(1).sum() - low * p.sum()
    return float(bound - p[len(p) - rest :].sum())


def assignment_cost(x: ArrayLike, centers: ArrayLike, labels: ArrayLike) -> float:
    """sum_i |x_i - c_label(i)|^2 in float64."""
    difference = np.asarray(x, np.float64) - np.asarray(centers, np.float64)[np.asarray(labels)]
    return float((difference**2).sum())


def sequential_round(x: ArrayLike, centers: ArrayLike) -> NDArray[np.int64]:
    """One round of Algorithm 1 of arXiv 2502.18965; the first N mod K clusters take one more."""
    costs = squared_distances(x, centers)
    n, clusters = costs.shape
    labels = np.full(n, -1)
    for k in range(clusters):
        left = np.flatnonzero(labels < 0)
        order = left[np.argsort(costs[left, k], kind="stable")]
        labels[order[: n // clusters + (k < n % clusters)]] = k
    return labels


def cluster_means(x: ArrayLike, labels: ArrayLike, clusters: int) -> NDArray[np.float64]:
    """Mean of the rows of each cluster, float64 [K, d]."""
    rows, codes = np.asarray(x, np.float64), np.asarray(labels)
    return np.stack([rows[codes == k].mean(0) for k in range(clusters)])
