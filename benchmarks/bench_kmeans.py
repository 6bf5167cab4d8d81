"""Balanced k-means beside what is public: exact steps, whole fits, memory, scaling.

The peers: k-means-constrained (exact by min-cost flow, on distances that are not squared), FAISS
and scikit-learn (no balance: a lower bound on time and objective), Sinkhorn with greedy rounding
(MiniOneRec, arXiv 2510.24431), Algorithm 1 of OneRec (arXiv 2502.18965). Those that cannot be
imported are left out.

    python benchmarks/bench_kmeans.py plot.png    # time of a fit over N and K, ours beside FAISS
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onerec._native import core
from onerec.tokenizer import BalancedKMeans, ResidualQuantizer, reference
from onerec.tokenizer.balanced_kmeans import priced_argmin
from onerec.tokenizer.residual_quantizer import describe_ids

PEERS = {"faiss": "faiss", "scikit-learn": "sklearn", "k-means-constrained": "k_means_constrained"}


def items(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    """300 anisotropic Gaussians with Zipf weights, the largest about a sixth of the rows."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, 301)
    means = generator.standard_normal((300, d))
    spread = 0.5 * generator.uniform(0.5, 1.5, (300, d))
    which = generator.choice(300, n, p=share / share.sum())
    return (means[which] + spread[which] * generator.standard_normal((n, d))).astype(np.float32)


def means_of(x: NDArray[np.float32], labels: NDArray[Any], clusters: int) -> NDArray[np.float32]:
    """Mean row of each cluster; an empty one gets zeros."""
    sums = np.zeros((clusters, x.shape[1]))
    order = np.argsort(labels, kind="stable")
    held, starts = np.unique(labels[order], return_index=True)
    sums[held] = np.add.reduceat(x[order].astype(np.float64), starts, axis=0)
    sizes = np.bincount(labels, minlength=clusters)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)


def sinkhorn(x: NDArray[np.float32], clusters: int, steps: int) -> NDArray[np.int64]:
    """Entropic transport at a tenth of the median spread; items then take their best free place."""
    rows = torch.from_numpy(x)
    n = len(x)
    generator = np.random.default_rng(0)
    centers = x[generator.choice(n, clusters, replace=False)]
    room = np.full(clusters, n // clusters) + (np.arange(clusters) < n % clusters)
    labels = np.zeros(n, np.int64)
    for _ in range(steps + 1):
        costs = torch.cdist(rows, torch.from_numpy(centers)).square()
        tau = 0.1 * float((costs.mean(1) - costs.amin(1)).median())
        g = torch.zeros(clusters)
        wanted = torch.from_numpy(room / n).float().log()
        for _ in range(50):
            f = -torch.logsumexp((g - costs) / tau, dim=1) * tau
            inner = torch.logsumexp((f[:, None] - costs) / tau, dim=0) - float(np.log(n))
            g = tau * (wanted - inner)
        preference = (costs - g).argsort(dim=1).numpy()
        left = room.copy()
        for i in generator.permutation(n):
            k = next(k for k in preference[i] if left[k] > 0)
            labels[i], left[k] = k, left[k] - 1
        centers = means_of(x, labels, clusters)
    return labels


def fit(provider: str, n: int, clusters: int, d: int, steps: int) -> dict[str, float]:
    """One fit from random rows, in this process; seconds, peak memory over the data's, quality."""
    x = items(n, d)
    threads = torch.get_num_threads()
    start = x[np.random.default_rng(1).choice(n, clusters, replace=False)]
    gap = float("nan")
    figures: dict[str, float] = {}
    if provider == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
    if provider == "scikit-learn":
        from sklearn.cluster import KMeans
    if provider == "k-means-constrained":
        from k_means_constrained import KMeansConstrained
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    if provider in ("priced", "fast", "sequential"):
        kmeans = BalancedKMeans(
            clusters, method=provider, max_iter=steps, tol=0, init=start, num_threads=threads
        ).fit(x)
        labels, gap = kmeans.labels_, kmeans.gap_
    elif provider == "faiss":
        found = faiss.Kmeans(d, clusters, niter=steps, max_points_per_centroid=n)
        found.train(x, init_centroids=start)
        labels = found.index.search(x, 1)[1][:, 0]
    elif provider == "scikit-learn":
        labels = KMeans(clusters, init=start, n_init=1, max_iter=steps, tol=0).fit(x).labels_
    elif provider == "k-means-constrained":
        labels = KMeansConstrained(
            clusters,
            size_min=n // clusters,
            size_max=-(-n // clusters),
            init=start,
            n_init=1,
            max_iter=steps,
            tol=0,
        ).fit_predict(x)
    else:
        labels = sinkhorn(x, clusters, steps)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sizes = np.bincount(labels, minlength=clusters)
    if provider not in ("faiss", "scikit-learn"):
        assert (sizes.min(), sizes.max()) == (n // clusters, -(-n // clusters))
    if provider == "priced":
        assert gap <= 1e-6
        figures["of it in passes"] = kmeans.work_["pass_seconds"] / seconds
    objective = reference.assignment_cost(x, means_of(x, labels, clusters), labels) / n
    return {
        "seconds": seconds,
        "MiB": peak / 1024,
        "objective": objective,
        "smallest": float(sizes.min()),
        "largest": float(sizes.max()),
        **({} if np.isnan(gap) else {"gap": gap}),
        **figures,
    }


def apart(*arguments: str | int) -> dict[str, float]:
    """`fit(*arguments)` in a process of its own."""
    command = [sys.executable, __file__, "fit", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def present(names: list[str]) -> list[str]:
    """Those of the providers that are ours or installed."""
    return [name for name in names if name not in PEERS or importlib.util.find_spec(PEERS[name])]


ALL = ["priced", "fast", "sequential", "sinkhorn", "faiss", "scikit-learn", "k-means-constrained"]
BIG = ["priced", "fast", "faiss"]


@pytest.mark.parametrize(
    ("n", "clusters", "d", "steps", "names"),
    [
        (10_240, 64, 64, 10, ALL),
        (10_240, 256, 64, 10, ALL[:-1]),
        (200_000, 1024, 128, 10, BIG),
        (1_000_000, 1024, 128, 1, BIG),
    ],
    ids=["10k-64", "10k-256", "200k-1024", "1M-1024-one-step"],
)
def test_fit(compare: Any, n: int, clusters: int, d: int, steps: int, names: list[str]) -> None:
    calls: Mapping[str, Callable[[], dict[str, float]]] = {
        name: partial(apart, name, n, clusters, d, steps) for name in present(names)
    }
    compare.alone(calls, facts={"steps": steps, "data MiB": round(n * d * 4 / 2**20, 1)})


@pytest.mark.parametrize(
    ("n", "clusters", "d"), [(51_200, 256, 64), (204_800, 64, 64)], ids=["51k-256", "205k-64"]
)
def test_exact_step(compare: Any, n: int, clusters: int, d: int) -> None:
    """One exact assignment at moved centres with the last step's prices, certificate included."""
    x = items(n, d)
    threads = torch.get_num_threads()
    kmeans = BalancedKMeans(clusters, max_iter=4, random_state=0, num_threads=threads).fit(x)
    centers = means_of(x, kmeans.labels_, clusters)
    labels = np.zeros(n, np.int32)

    def ours() -> dict[str, float]:
        prices = kmeans.prices_.copy()
        return core().balanced_assign(
            x=x.ctypes.data,
            rows=n,
            columns=d,
            stride=d,
            centers=centers.ctypes.data,
            clusters=clusters,
            seed=0,
            num_threads=threads,
            memory_budget=2 << 30,
            prices_given=True,
            prices=prices.ctypes.data,
            labels=labels.ctypes.data,
        )

    work = ours()
    cost = work["cost"]
    seconds = sum(work[key] for key in ("pass_seconds", "price_seconds", "finish_seconds"))
    rows, columns = torch.from_numpy(x), torch.from_numpy(centers).T.contiguous()
    product = torch.empty(n, clusters)
    begin = time.perf_counter()
    for _ in range(5):
        torch.matmul(rows, columns, out=product)
    rate = 5 * 2 * n * clusters * d / (time.perf_counter() - begin)
    facts = {
        "gap": work["gap"],
        "passes": work["passes"],
        "share in passes": round(work["pass_seconds"] / seconds, 3),
        "passes, share of the matmul rate": round(
            work["passes"] * 2 * n * clusters * d / work["pass_seconds"] / rate, 3
        ),
        "matmul GFLOP/s": round(rate / 1e9, 1),
    }
    if importlib.util.find_spec("k_means_constrained"):
        from k_means_constrained.k_means_constrained_ import _labels_constrained

        distances = np.zeros(n, np.float32)
        begin = time.perf_counter()
        _labels_constrained(x, centers, n // clusters, n // clusters, distances)
        slow = time.perf_counter() - begin
        facts["k-means-constrained, one call, s"] = round(slow, 2)

    def check(result: Any, expected: Any) -> None:
        if isinstance(result, dict):
            assert result["gap"] <= 1e-6
            assert result["cost"] == pytest.approx(cost, rel=1e-9)
            assert set(np.bincount(labels)) == {n // clusters}

    compare(
        {
            "exact": ours,
            "priced argmin": lambda: priced_argmin(x, centers, kmeans.prices_, threads),
        },
        check=check,
        expected=cost,
        facts=facts,
        seconds=5,
    )


def coded(name: str, x: NDArray[np.float32], levels: int, size: int) -> dict[str, float]:
    """Semantic ids of real items: seconds, error and collisions."""
    begin = time.perf_counter()
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        residual, columns = x.copy(), []
        for level in range(levels):
            found = faiss.Kmeans(x.shape[1], size, niter=10, seed=level + 1)
            found.cp.max_points_per_centroid = len(x)
            found.train(residual)
            columns.append(found.index.search(residual, 1)[1][:, 0])
            residual -= found.centroids[columns[-1]]
        sids = np.stack(columns, axis=1).astype(np.int32)
        mse = float((residual.astype(np.float64) ** 2).sum(1).mean())
    else:
        method, distinct = ("sequential", "none") if name == "sequential" else ("priced", name)
        quantizer = ResidualQuantizer(
            levels, size, method=method, distinct=distinct, random_state=0
        ).fit(x)
        sids, mse = quantizer.sids_, quantizer.report_["mse"]
    report = describe_ids(sids, size)
    if name in ("distinct", "rank"):
        assert report["unique_share"] == 1
    return {
        "seconds": time.perf_counter() - begin,
        "MSE": mse,
        "unique share": report["unique_share"],
        "collision rate": report["collision_rate"],
        "largest collision": report["largest_collision"],
        "bits at the last level": report["entropy"][levels - 1],
        "used at the last level": report["utilisation"][levels - 1],
    }


def test_semantic_ids(compare: Any) -> None:
    """3 x 256 ids of the 12,101 items of Amazon Beauty, 384-d text vectors; wants ONEREC_DATA."""
    folder = os.environ.get("ONEREC_DATA")
    path = Path(folder or "") / "amazon2014_beauty" / "item_embeddings_minilm.npy"
    if folder is None or not path.exists():
        pytest.skip("wants ONEREC_DATA with amazon2014_beauty/item_embeddings_minilm.npy")
    x = np.load(path).astype(np.float32)
    names = present(["distinct", "none", "cap", "rank", "sequential", "faiss"])
    compare.alone({name: partial(coded, name, x, 3, 256) for name in names})


def plot(path: str) -> None:
    """Time of a fit of three steps over N and K, ours beside FAISS, as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    lines = [
        ("N, at K = 256", [12_800, 25_600, 51_200, 102_400], lambda v: (v, 256)),
        ("K, at N = 51,200", [32, 64, 128, 256, 512], lambda v: (51_200, v)),
    ]
    for axis, (label, values, shape) in zip(axes, lines, strict=True):
        for name in present(BIG):
            seconds = [apart(name, *shape(v), 64, 3)["seconds"] for v in values]
            axis.loglog(values, seconds, marker="o", label=name)
        axis.set_xlabel(label)
        axis.legend()
    axes[0].set_ylabel("seconds, 3 steps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        print(json.dumps(fit(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        plot(sys.argv[1])
