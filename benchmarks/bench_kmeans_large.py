"""Balanced k-means of a million vectors: minutes, so that it runs by its name alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench_kmeans import apart, present


def test_fit(compare: Any) -> None:
    """Ten steps at N = 1,000,000, K = 1,024, d = 128."""
    n, clusters, d, steps = 1_000_000, 1024, 128, 10
    compare.alone(
        {
            name: partial(apart, name, n, clusters, d, steps)
            for name in present(["priced", "faiss"])
        },
        facts={"steps": steps, "data MiB": round(n * d * 4 / 2**20, 1)},
    )
