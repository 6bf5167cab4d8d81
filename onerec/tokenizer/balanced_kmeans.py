"""Balanced k-means: clusters of equal size, with a certificate of optimality."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from onerec._native import core
from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.progress import Progress

Method = Literal["priced", "sequential"]


def as_rows(x: ArrayLike | torch.Tensor, name: str = "X") -> NDArray[np.float32]:
    """`x` as float32 [n, d] with dense rows on the host; no copy where it is that already.

    Raises:
        TypeError: `x` is not numeric.
        ValueError: `x` is not two-dimensional or has no columns.
    """
    if isinstance(x, torch.Tensor):
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: wanted a tensor on the CPU or CUDA, got one on {x.device}")
        x = x.detach().float().cpu().numpy()
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: wanted numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name}: wanted shape [n, d] with d >= 1, got {list(array.shape)}")
    if array.dtype != np.float32:
        with np.errstate(over="ignore"):  # what leaves the range of float32 is refused as infinite
            array = array.astype(np.float32)
    if array.strides[1] != 4 or array.strides[0] % 4 != 0 or array.strides[0] < 4 * array.shape[1]:
        array = np.ascontiguousarray(array)
    return array


def stride_of(x: NDArray[np.float32]) -> int:
    """Floats from one row of `x` to the next."""
    return x.strides[0] // 4 if x.shape[0] > 1 else x.shape[1]


def seed_of(random_state: int | np.random.Generator | None) -> int:
    """A 64-bit seed from scikit-learn's kinds of `random_state`."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**63))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise TypeError(
            f"random_state: wanted an int, a numpy Generator or None, got {random_state!r}"
        )
    return int(random_state) % 2**64


def positive(name: str, value: int) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: wanted an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: wanted at least 1, got {value}")
    return int(value)


def cuda_device(device: str | torch.device | None, x: object = None) -> int:
    """Number of the CUDA device to work on, -1 for the CPU; None means where the tensor `x` is.

    Raises:
        ValueError: The device is of another kind.
    """
    if device is None:
        device = x.device if isinstance(x, torch.Tensor) else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return -1
    if wanted.type != "cuda":
        raise ValueError(f"device: wanted a CPU or a CUDA device, got {str(wanted)!r}")
    if wanted.index is not None:
        return wanted.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


class BalancedKMeans:
    """K-means whose clusters all hold floor(N/K) or ceil(N/K) items.

    `priced` finds the cheapest assignment of these sizes at each step. It is a power diagram: item
    x goes to argmin_k |x - c_k|^2 + price_k (Aurenhammer, Hoffmann, Aronov, "Minkowski-type
    theorems and least-squares clustering"), so that new items are encoded by the same rule. The
    prices come from Newton steps on the annealed entropic dual of a sample, the exact sizes from a
    network simplex over candidate lists (from shortest augmenting paths where a cluster holds more
    than 1,024 items), and `gap_` certifies the result. `sequential` is Algorithm 1 of OneRec (arXiv
    2502.18965, section 3.1) as printed: clusters in turn take the nearest items that are left; with
    N not divisible by K the first N mod K clusters take one more. It depends on the order of the
    clusters and is much worse; it is the faithful baseline.

    The same data and seed give the same result for every number of threads. Ties go to the smaller
    cluster, then to the smaller item index.

    Args:
        n_clusters: K.
        method: "priced" or "sequential".
        max_iter: Lloyd steps at most. Except with "sequential", one more assignment follows the
            last step, so that labels and prices belong to the final centres.
        tol: Except with "sequential", fitting stops when a step lowers the inertia by less than
            this share.
        init: "random" (distinct rows of X) or starting centres, float32 [K, d].
        random_state: Seed or generator of the starting centres; None draws a new one.
        num_threads: Threads; None takes `torch.get_num_threads()`.
        memory_budget: Bytes to use beside X and the results.
        device: "cuda" makes the passes over all items and centres on that device, which holds a
            copy of X; the exact finish stays on the host. None: where X is, if it is a tensor. The
            labels are those of the CPU but where two assignments cost the same up to the rounding
            of float64. "sequential" stays on the CPU.

    Attributes:
        labels_: int32 [N], the balanced assignment.
        cluster_centers_: float32 [K, d].
        prices_: float64 [K] with mean zero; zeros for "sequential".
        sizes_: int64 [K].
        inertia_: Sum of squared distances of the items to their centres, float64.
        gap_: Certified relative duality gap of `labels_` at `cluster_centers_`, in float64: no
            assignment of these sizes is cheaper by more than this share. NaN for "sequential".
        n_iter_: Lloyd steps made.
        converged_: Whether the assignment stood still or `tol` was reached.
        work_: Counts and seconds: passes over all items and centres, dual sweeps, moves of the
            exact finish.
    """

    labels_: NDArray[np.int32]
    cluster_centers_: NDArray[np.float32]
    prices_: NDArray[np.float64]
    sizes_: NDArray[np.int64]
    inertia_: float
    gap_: float
    n_iter_: int
    converged_: bool
    work_: dict[str, float]

    def __init__(
        self,
        n_clusters: int,
        *,
        method: Method = "priced",
        max_iter: int = 10,
        tol: float = 1e-4,
        init: Literal["random"] | ArrayLike = "random",
        random_state: int | np.random.Generator | None = None,
        num_threads: int | None = None,
        memory_budget: int = 2 << 30,
        device: str | torch.device | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.method = method
        self.max_iter = max_iter
        self.tol = tol
        self.init = init
        self.random_state = random_state
        self.num_threads = num_threads
        self.memory_budget = memory_budget
        self.device = device

    _parameters = (
        "n_clusters",
        "method",
        "max_iter",
        "tol",
        "init",
        "random_state",
        "num_threads",
        "memory_budget",
        "device",
    )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, as scikit-learn's `clone` wants them."""
        return {name: getattr(self, name) for name in self._parameters}

    def set_params(self, **params: Any) -> BalancedKMeans:
        """Sets constructor arguments.

        Raises:
            ValueError: A name is unknown.
        """
        for name, value in params.items():
            if name not in self._parameters:
                raise ValueError(f"{name}: not a parameter of BalancedKMeans")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"BalancedKMeans({self.n_clusters}, method={self.method!r})"

    def _threads(self) -> int:
        if self.num_threads is None:
            return torch.get_num_threads()
        return positive("num_threads", self.num_threads)

    def fit(
        self,
        X: ArrayLike | torch.Tensor,
        y: None = None,
        sample_weight: None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> BalancedKMeans:
        """Finds centres and the balanced assignment of the rows of X.

        Args:
            X: [N, d], taken as float32; N >= n_clusters, every value finite and of size 1e15 at
                most. A float32 `numpy.memmap` (see `open_rows`) is read in pieces and never copied.
            y: Ignored.
            sample_weight: Not supported: sizes count items.
            checkpoint: File that holds centres, prices, labels and counters after each Lloyd step.
                If it is there already, fitting goes on from it to the same result.
            progress: Called as `progress(steps, max_iter, note)` after each Lloyd step.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range; the message names it, what was wanted and what
                came.
        """
        if sample_weight is not None:
            raise ValueError(
                "sample_weight: not supported, since cluster sizes count items; got weights"
            )
        clusters = positive("n_clusters", self.n_clusters)
        if self.method not in ("priced", "sequential"):
            raise ValueError(f'method: wanted "priced" or "sequential", got {self.method!r}')
        if not self.tol >= 0:
            raise ValueError(f"tol: wanted a number of at least 0, got {self.tol!r}")
        x = as_rows(X)
        given = not (isinstance(self.init, str) and self.init == "random")
        if given:
            if isinstance(self.init, str):
                raise ValueError(f'init: wanted "random" or an array, got {self.init!r}')
            centers = np.array(as_rows(self.init, "init"), order="C")
            if centers.shape != (clusters, x.shape[1]):
                raise ValueError(
                    f"init: wanted shape {[clusters, x.shape[1]]}, got {list(centers.shape)}"
                )
        else:
            if x.shape[0] < clusters:  # before memory is taken for the centres
                raise ValueError(
                    f"X: wanted at least n_clusters = {clusters} rows, got {x.shape[0]}"
                )
            centers = np.zeros((clusters, x.shape[1]), np.float32)
        prices = np.zeros(clusters, np.float64)
        labels = np.zeros(x.shape[0], np.int32)
        seed, steps, inertia = seed_of(self.random_state), 0, 0.0
        task = {
            "shape": list(x.shape),
            "n_clusters": clusters,
            "method": self.method,
            "init": "given" if given else "random",
            "random_state": None if self.random_state is None else seed,
        }
        if checkpoint is not None and self.method == "sequential":
            raise ValueError('checkpoint: wanted None with method="sequential"')
        if checkpoint is not None and Path(checkpoint).exists():
            seed, steps, inertia = _restore(Path(checkpoint), task, centers, prices, labels)
            given = True

        def after(steps: int, inertia: float) -> None:
            if checkpoint is not None:
                state = {"task": task, "seed": seed, "steps": steps, "inertia": inertia}
                with atomic_write(checkpoint) as path, path.open("wb") as file:
                    np.savez(
                        file,
                        state=json.dumps(state),
                        centers=centers,
                        prices=prices,
                        labels=labels,
                    )
            if progress is not None:
                progress(steps, self.max_iter, f"inertia {inertia:.6g}" if inertia else "")

        report = core().balanced_kmeans_fit(
            x=x.ctypes.data,
            rows=x.shape[0],
            columns=x.shape[1],
            stride=stride_of(x),
            clusters=clusters,
            method=self.method,
            max_iter=positive("max_iter", self.max_iter),
            tolerance=float(self.tol),
            seed=seed,
            num_threads=self._threads(),
            memory_budget=positive("memory_budget", self.memory_budget),
            centers_given=given,
            centers=centers.ctypes.data,
            prices=prices.ctypes.data,
            labels=labels.ctypes.data,
            steps_done=steps,
            inertia_done=inertia,
            on_iteration=after,
            cuda_device=cuda_device(self.device, X),
        )
        self.cluster_centers_ = centers
        self.prices_ = prices
        self.labels_ = labels
        self.sizes_ = np.bincount(labels, minlength=clusters)
        self.inertia_ = report.pop("inertia")
        self.gap_ = report.pop("gap")
        self.n_iter_ = report.pop("iterations")
        self.converged_ = report.pop("converged")
        self.work_ = report
        return self

    def fit_predict(
        self, X: ArrayLike | torch.Tensor, y: None = None, sample_weight: None = None
    ) -> NDArray[np.int32]:
        """`fit(X).labels_`: the balanced assignment of the rows of X."""
        return self.fit(X, y, sample_weight).labels_

    def predict(self, X: ArrayLike | torch.Tensor) -> NDArray[np.int32]:
        """argmin_k |x - c_k|^2 + price_k for each row of X [n, d]; int32 [n].

        Decided in float64; of equal values the smallest k. Sizes are not held: see `fit`.

        Raises:
            RuntimeError: `fit` has not been called.
            ValueError: X has another number of columns, or a value that is not finite.
        """
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("predict: call fit first")
        return priced_argmin(
            X, self.cluster_centers_, self.prices_, self._threads(), device=self.device
        )


def _restore(
    path: Path,
    task: dict[str, Any],
    centers: NDArray[np.float32],
    prices: NDArray[np.float64],
    labels: NDArray[np.int32],
) -> tuple[int, int, float]:
    """Reads a checkpoint into centres, prices and labels; returns seed, Lloyd steps and inertia.

    Raises:
        DataError: The file is damaged, or belongs to another fit.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            state = json.loads(str(saved["state"]))
            found = saved["centers"], saved["prices"], saved["labels"]
        for name, wanted in task.items():
            if state["task"][name] != wanted:
                raise DataError(
                    f"{path}: {name}: wanted a checkpoint for {wanted}, got {state['task'][name]}"
                )
        centers[:], prices[:], labels[:] = found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: wanted a checkpoint of this k-means, got {error}") from error
    return int(state["seed"]), int(state["steps"]), float(state["inertia"])


def priced_argmin(
    X: ArrayLike | torch.Tensor,
    centers: NDArray[np.float32],
    prices: NDArray[np.float64],
    num_threads: int | None = None,
    *,
    device: str | torch.device | None = None,
) -> NDArray[np.int32]:
    """argmin_k |x - c_k|^2 + price_k for each row of X [n, d], int32 [n]; of equals the smallest k.

    Args:
        X: [n, d], taken as float32.
        centers: float32 [K, d], contiguous.
        prices: float64 [K], contiguous.
        num_threads: None takes `torch.get_num_threads()`.
        device: See `BalancedKMeans`.

    Raises:
        ValueError: X has another number of columns than the centres, or a value that is not finite.
    """
    x = as_rows(X)
    if x.shape[1] != centers.shape[1]:
        raise ValueError(f"X: wanted {centers.shape[1]} columns, got {x.shape[1]}")
    labels = np.zeros(x.shape[0], np.int32)
    core().priced_argmin(
        x=x.ctypes.data,
        rows=x.shape[0],
        columns=x.shape[1],
        stride=stride_of(x),
        centers=centers.ctypes.data,
        clusters=centers.shape[0],
        prices=prices.ctypes.data,
        num_threads=num_threads or torch.get_num_threads(),
        labels=labels.ctypes.data,
        distances=0,
        cuda_device=cuda_device(device, X),
    )
    return labels
