"""Balanced k-means beside what is public: exact steps, whole fits, memory, scaling.

The peers: k-means-constrained (exact by min-cost flow, on distances that are not squared), FAISS
and scikit-learn (no balance: a lower bound on time and objective), Sinkhorn with greedy rounding
(MiniOneRec, arXiv 2510.24431), Algorithm 1 of OneRec (arXiv 2502.18965). Those that cannot be
imported are left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onerec._native import core
from onerec.tokenizer import BalancedKMeans, reference
from onerec.tokenizer.balanced_kmeans import priced_argmin

PEERS = {"faiss": "faiss", "scikit-learn": "sklearn", "k-means-constrained": "k_means_constrained"}


@lru_cache(maxsize=1)
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


def memory(entry: str) -> float:
    """VmRSS or VmHWM of this process in MiB; NaN where the system does not tell."""
    with open("/proc/self/status") as file:
        found = (int(line.split()[1]) / 1024 for line in file if line.startswith(entry))
        return next(found, float("nan"))


def forget_peak() -> None:
    """The peak of this process's resident memory is what it has now, where the system lets it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def fit(provider: str, n: int, clusters: int, d: int, steps: int) -> dict[str, float]:
    """One fit from random rows, in this process; seconds, peak memory over the data's, quality.

    Args:
        provider: A peer's name, or a method of ours, "priced on cuda" for one on another device.
        n: Rows.
        clusters: K.
        d: Columns.
        steps: Lloyd steps.
    """
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
    forget_peak()
    before = memory("VmRSS")
    begin, processor = time.perf_counter(), time.process_time()
    method, _, device = provider.partition(" on ")
    if method in ("priced", "sequential"):
        kmeans = BalancedKMeans(
            clusters,
            method=method,
            max_iter=steps,
            tol=0,
            init=start,
            num_threads=threads,
            device=device or None,
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
    figures["processor s"] = round(time.process_time() - processor, 3)
    peak = memory("VmHWM") - before
    sizes = np.bincount(labels, minlength=clusters)
    if provider not in ("faiss", "scikit-learn"):
        assert (sizes.min(), sizes.max()) == (n // clusters, -(-n // clusters))
    if method == "priced":
        assert gap <= 1e-6
        figures["of it in passes"] = kmeans.work_["pass_seconds"] / seconds
    if device:
        figures |= kmeans.work_
    objective = reference.assignment_cost(x, means_of(x, labels, clusters), labels) / n
    return {
        "seconds": seconds,
        **({} if np.isnan(peak) else {"MiB beside the data": round(peak, 1)}),
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


ALL = ["priced", "sequential", "sinkhorn", "faiss", "scikit-learn", "k-means-constrained"]


@pytest.mark.parametrize(
    ("n", "clusters", "d", "steps", "names"),
    [
        (10_240, 64, 64, 2, ALL),
        (200_000, 1024, 128, 10, ["priced", "faiss"]),
    ],
    ids=["10k-64", "200k-1024"],
)
def test_fit(compare: Any, n: int, clusters: int, d: int, steps: int, names: list[str]) -> None:
    calls: Mapping[str, Callable[[], dict[str, float]]] = {
        name: partial(apart, name, n, clusters, d, steps) for name in present(names)
    }
    compare.alone(calls, facts={"steps": steps, "data MiB": round(n * d * 4 / 2**20, 1)})


SCALING = [
    *(("N, at K = 128", n, n, 128) for n in (6_400, 12_800, 25_600)),
    *(("K, at N = 12,800", k, 12_800, k) for k in (32, 64, 128, 256)),
]


@pytest.mark.parametrize(
    ("axis", "value", "n", "clusters"), SCALING, ids=[f"{n}-{k}" for _, _, n, k in SCALING]
)
def test_scaling(compare: Any, axis: str, value: int, n: int, clusters: int) -> None:
    """Time of a fit of three steps over N and over K, d = 64."""
    compare.alone(
        {name: partial(fit, name, n, clusters, 64, 3) for name in present(["priced", "faiss"])},
        facts={"axis": axis, "value": value},
    )


class Step:
    """One exact assignment at given centres from given prices and labels, certificate included."""

    def __init__(
        self,
        x: NDArray[np.float32],
        centers: NDArray[np.float32],
        prices: NDArray[np.float64],
        labels: NDArray[np.int32],
        threads: int,
    ) -> None:
        self.x, self.centers, self.prices, self.threads = x, centers, prices, threads
        self.start, self.labels = labels, labels.copy()

    def __call__(self) -> dict[str, float]:
        prices = self.prices.copy()
        self.labels[:] = self.start
        return dict(
            core().balanced_assign(
                x=self.x.ctypes.data,
                rows=self.x.shape[0],
                columns=self.x.shape[1],
                stride=self.x.shape[1],
                centers=self.centers.ctypes.data,
                clusters=len(self.centers),
                seed=0,
                num_threads=self.threads,
                memory_budget=2 << 30,
                prices_given=True,
                prices=prices.ctypes.data,
                labels=self.labels.ctypes.data,
                labels_given=True,
            )
        )

    def check(self, result: Any, cost: float) -> None:
        if isinstance(result, dict):
            assert result["gap"] <= 1e-6
            assert result["cost"] == pytest.approx(cost, rel=1e-9)
            low, rest = divmod(len(self.x), len(self.centers))
            sizes = np.bincount(self.labels, minlength=len(self.centers))
            assert (sizes.min(), sizes.max()) == (low, low + (rest > 0))


@pytest.mark.parametrize(
    ("n", "clusters", "d"), [(51_200, 256, 64), (204_800, 64, 64)], ids=["51k-256", "205k-64"]
)
def test_exact_step(compare: Any, n: int, clusters: int, d: int) -> None:
    """A fit's next step: an exact assignment at moved centres, certificate included."""
    x = items(n, d)
    threads = torch.get_num_threads()
    kmeans = BalancedKMeans(clusters, max_iter=4, random_state=0, num_threads=threads).fit(x)
    centers = means_of(x, kmeans.labels_, clusters)
    ours = Step(x, centers, kmeans.prices_, kmeans.labels_, threads)
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

    compare(
        {
            "exact": ours,
            "priced argmin": lambda: priced_argmin(x, centers, kmeans.prices_, threads),
        },
        check=ours.check,
        expected=cost,
        facts=facts,
        seconds=3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "clusters", "d"),
    [(200_000, 1024, 128), (1_000_000, 8192, 256)],  # the second: OneRec's codebooks
    ids=["200k-1024", "1M-8192"],
)
def test_fit_on_gpu(compare: Any, n: int, clusters: int, d: int) -> None:
    """A Lloyd step: two assignments, the second from the first one's prices, and a certificate."""
    compare.alone(
        {"priced": partial(fit, "priced on cuda", n, clusters, d, 1)},
        facts={"steps": 1, "data MiB": round(n * d * 4 / 2**20, 1)},
        device="cuda",
    )


if __name__ == "__main__":
    print(json.dumps(fit(sys.argv[2], *map(int, sys.argv[3:]))))
