"""Residual quantisation: an item's semantic id is one balanced code for each level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from onerec._native import core
from onerec.files import atomic_write
from onerec.tokenizer.balanced_kmeans import (
    BalancedKMeans,
    Method,
    as_rows,
    positive,
    priced_argmin,
    seed_of,
    stride_of,
)

Distinct = Literal["none", "cap", "distinct", "rank"]
_FORMAT = 1


class ResidualQuantizer:
    """Semantic ids from L levels of balanced k-means, each on what the levels before left over.

    Level l codes the residual r_l = x - c_1[s_1] - ... - c_{l-1}[s_{l-1}] (arXiv 2502.18965,
    section 3.1). Items that are fitted get the balanced assignment of each level, new items the
    priced argmin. Balance alone does not make ids distinct; `distinct` says what to do about items
    that would share one:

    - "none": nothing; every level is balanced exactly.
    - "cap": a prefix s_1..s_l takes at most K^(L-l) items, so that distinct completions exist.
    - "distinct": as "cap", and inside each prefix of the last level every item gets a code of its
      own by a minimum-cost matching: ids are unique, for identical rows too. Needs N <= K^L.
    - "rank": as "none", plus a level L + 1 that numbers the items of an id 0, 1, ... in item order
      (as MiniOneRec does, arXiv 2510.24431).

    Args:
        levels: L.
        codebook_size: K, the codes of each level.
        method: "priced" or "sequential", see `BalancedKMeans`.
        distinct: see above.
        max_iter: Lloyd steps of each level.
        random_state: Seed or generator.
        num_threads: Threads; None takes `torch.get_num_threads()`.
        memory_budget: Bytes to use beside the data, its residual and the results.

    Attributes:
        sids_: int32 [N, L], or [N, L + 1] with "rank": ids of the fitted items.
        codebooks_: float32 [L, K, d].
        prices_: float64 [L, K].
        gaps_: certified duality gap of each level's balanced assignment.
        report_: What became of the data: `n_items`, `mse` (mean squared distance of an item to its
            decoded id), `mse_per_level`, `utilisation`, `entropy` (bits) and `sizes` [min, max] of
            each level, `unique_share` (items alone on their id), `collision_rate` (1 - distinct
            ids / items), `largest_collision`.
    """

    sids_: NDArray[np.int32]
    codebooks_: NDArray[np.float32]
    prices_: NDArray[np.float64]
    gaps_: list[float]
    report_: dict[str, Any]

    def __init__(
        self,
        levels: int = 3,
        codebook_size: int = 8192,
        *,
        method: Method = "priced",
        distinct: Distinct = "none",
        max_iter: int = 10,
        random_state: int | np.random.Generator | None = None,
        num_threads: int | None = None,
        memory_budget: int = 2 << 30,
    ) -> None:
        if distinct not in ("none", "cap", "distinct", "rank"):
            raise ValueError(
                f'distinct: wanted "none", "cap", "distinct" or "rank", got {distinct!r}'
            )
        self.levels = positive("levels", levels)
        self.codebook_size = positive("codebook_size", codebook_size)
        self.method = method
        self.distinct = distinct
        self.max_iter = max_iter
        self.random_state = random_state
        self.num_threads = num_threads
        self.memory_budget = memory_budget

    def fit(self, X: ArrayLike | torch.Tensor) -> ResidualQuantizer:
        """Fits the codebooks to X [N, d] (taken as float32) and codes its rows.

        Raises:
            TypeError: X is not numeric.
            ValueError: X has too few rows, values that are not finite, or more rows than there are
                ids while `distinct` asks for distinct ones.
        """
        x = as_rows(X)
        n, d = x.shape
        if self.distinct in ("cap", "distinct") and n > self.codebook_size**self.levels:
            raise ValueError(
                f"X: wanted at most codebook_size ** levels = {self.codebook_size**self.levels} "
                f"rows for distinct={self.distinct!r}, got {n}"
            )
        generator = np.random.default_rng(seed_of(self.random_state))
        residual = np.array(x, order="C")
        codebooks = np.zeros((self.levels, self.codebook_size, d), np.float32)
        prices = np.zeros((self.levels, self.codebook_size), np.float64)
        sids = np.zeros((n, self.levels), np.int32)
        groups = np.zeros(n, np.int64)
        self.gaps_ = []
        errors = []
        for level in range(self.levels):
            kmeans = BalancedKMeans(
                self.codebook_size,
                method=self.method,
                max_iter=self.max_iter,
                random_state=generator,
                num_threads=self.num_threads,
                memory_budget=self.memory_budget,
            ).fit(residual)
            codes = kmeans.labels_
            last = level == self.levels - 1
            if self.distinct == "distinct" or (self.distinct == "cap" and not last):
                cap = self.codebook_size ** (self.levels - 1 - level)
                codes = _capped(kmeans, residual, groups, cap, codes)
            groups = _number(groups, codes)
            residual -= kmeans.cluster_centers_[codes]
            codebooks[level] = kmeans.cluster_centers_
            prices[level] = kmeans.prices_
            sids[:, level] = codes
            self.gaps_.append(kmeans.gap_)
            errors.append(_mean_square(residual))
        if self.distinct == "rank":
            sids = np.concatenate([sids, self._ranks(groups)[:, None]], axis=1)
        self.codebooks_ = codebooks
        self.prices_ = prices
        self.sids_ = np.ascontiguousarray(sids)
        self.report_ = {"n_items": n, "mse": errors[-1], "mse_per_level": errors}
        self.report_.update(describe_ids(self.sids_, self.codebook_size))
        self.report_["gaps"] = self.gaps_
        return self

    def _ranks(self, groups: NDArray[np.int64]) -> NDArray[np.int32]:
        order = np.argsort(groups, kind="stable")
        sizes = np.bincount(groups)
        if sizes.max() > self.codebook_size:
            raise ValueError(
                f'distinct="rank": wanted at most codebook_size = {self.codebook_size} items on an '
                f"id, got {sizes.max()}; use more levels, a larger codebook or "
                f'distinct="distinct"'
            )
        ranks = np.empty(len(groups), np.int32)
        ranks[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return ranks

    def encode(self, X: ArrayLike | torch.Tensor) -> NDArray[np.int32]:
        """Codes of new items: at each level argmin_k |r - c_k|^2 + price_k.

        Args:
            X: [n, d], taken as float32.

        Returns:
            int32 [n, L]; with distinct="rank" [n, L + 1], the last column 0.

        Raises:
            RuntimeError: There are no codebooks yet.
            ValueError: X has another number of columns, or values that are not finite.
        """
        self._fitted("encode")
        x = as_rows(X)
        if x.shape[1] != self.codebooks_.shape[2]:
            raise ValueError(f"X: wanted {self.codebooks_.shape[2]} columns, got {x.shape[1]}")
        residual = np.array(x, order="C")
        sids = np.zeros((x.shape[0], self.levels + (self.distinct == "rank")), np.int32)
        for level in range(self.levels):
            codes = priced_argmin(
                residual, self.codebooks_[level], self.prices_[level], self.num_threads
            )
            residual -= self.codebooks_[level][codes]
            sids[:, level] = codes
        return sids

    def decode(self, sids: ArrayLike) -> NDArray[np.float32]:
        """Sum of the centres that ids name.

        Args:
            sids: [n, L] integers in 0..K-1; a rank column, if any, says nothing of the vector.

        Returns:
            float32 [n, d].

        Raises:
            RuntimeError: There are no codebooks yet.
            ValueError: The shape is wrong or a code is out of range.
        """
        self._fitted("decode")
        codes = np.asarray(sids)
        width = self.levels + (self.distinct == "rank")
        if codes.ndim != 2 or codes.shape[1] not in (self.levels, width):
            raise ValueError(f"sids: wanted shape [n, {width}], got {list(codes.shape)}")
        if codes.dtype.kind not in "iu":
            raise TypeError(f"sids: wanted integers, got dtype {codes.dtype}")
        codes = codes[:, : self.levels]
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if wrong.any():
            row, level = (int(v[0]) for v in wrong.nonzero())
            raise ValueError(
                f"sids: wanted codes in 0..{self.codebook_size - 1}, got {codes[row, level]} in "
                f"row {row}, level {level}"
            )
        x = np.zeros((codes.shape[0], self.codebooks_.shape[2]), np.float32)
        for level in range(self.levels):
            x += self.codebooks_[level][codes[:, level]]
        return x

    def _fitted(self, verb: str) -> None:
        if not hasattr(self, "codebooks_"):
            raise RuntimeError(f"{verb}: call fit or from_pretrained first")

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors (codebooks, prices) to `directory`."""
        from safetensors.numpy import save_file

        self._fitted("save_pretrained")
        directory = Path(directory)
        with atomic_write(directory / "model.safetensors") as path:
            save_file({"codebooks": self.codebooks_, "prices": self.prices_}, path)
        config = {
            "format": _FORMAT,
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "dimension": self.codebooks_.shape[2],
            "method": self.method,
            "distinct": self.distinct,
            "max_iter": self.max_iter,
            "report": self.report_,
        }
        with atomic_write(directory / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ResidualQuantizer:
        """Reads what `save_pretrained` wrote; `encode` and `decode` work, `sids_` is not kept.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The files are not a quantiser's, or do not agree.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        directory = Path(directory)
        config_path = directory / "config.json"
        try:
            config = json.loads(config_path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{config_path}: wanted JSON, got {error}") from error
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ValueError(f"{config_path}: wanted a quantiser's config of format {_FORMAT}")
        try:
            tensors = load_file(directory / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{directory / 'model.safetensors'}: {error}") from error
        quantizer = cls(
            config["levels"],
            config["codebook_size"],
            method=config["method"],
            distinct=config["distinct"],
            max_iter=config["max_iter"],
        )
        shape = (config["levels"], config["codebook_size"], config["dimension"])
        wanted = {"codebooks": (shape, np.float32), "prices": (shape[:2], np.float64)}
        for name, (size, dtype) in wanted.items():
            found = tensors.get(name)
            if found is None or found.shape != size or found.dtype != dtype:
                came = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ValueError(
                    f"{directory / 'model.safetensors'}: {name}: wanted {np.dtype(dtype).name} "
                    f"{list(size)}, got {came}"
                )
        quantizer.codebooks_ = tensors["codebooks"]
        quantizer.prices_ = tensors["prices"]
        quantizer.report_ = config["report"]
        return quantizer


def describe_ids(sids: NDArray[np.int32], codebook_size: int) -> dict[str, Any]:
    """Balance of each level and collisions of ids [N, L]; the keys are those of `report_`."""
    n = sids.shape[0]
    utilisation, entropy, sizes = [], [], []
    for codes in sids.T:
        counts = np.bincount(codes, minlength=codebook_size)
        share = counts[counts > 0] / n
        utilisation.append(float((counts > 0).mean()))
        entropy.append(float(-(share * np.log2(share)).sum()))
        sizes.append([int(counts.min()), int(counts.max())])
    _, holders = np.unique(sids, axis=0, return_counts=True)
    return {
        "utilisation": utilisation,
        "entropy": entropy,
        "sizes": sizes,
        "unique_share": float((holders == 1).sum() / n),
        "collision_rate": float(1 - len(holders) / n),
        "largest_collision": int(holders.max()),
    }


def _mean_square(rows: NDArray[np.float32]) -> float:
    return float(np.einsum("ij,ij->", rows, rows, dtype=np.float64) / rows.shape[0])


def _number(groups: NDArray[np.int64], codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Numbers the prefixes (group, code) from 0."""
    width = int(codes.max()) + 1
    numbers: NDArray[np.int64] = np.unique(groups * width + codes, return_inverse=True)[1]
    return numbers.astype(np.int64, copy=False)


def _capped(
    kmeans: BalancedKMeans,
    x: NDArray[np.float32],
    groups: NDArray[np.int64],
    cap: int,
    codes: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Codes of which no group holds more than `cap`, cheapest at the k-means' prices."""
    if np.bincount(_number(groups, codes)).max() <= cap:
        return codes
    capped = np.zeros_like(codes)
    groups = np.ascontiguousarray(groups)
    core().capped_assign(
        x=x.ctypes.data,
        rows=x.shape[0],
        columns=x.shape[1],
        stride=stride_of(x),
        centers=kmeans.cluster_centers_.ctypes.data,
        clusters=kmeans.n_clusters,
        prices=kmeans.prices_.ctypes.data,
        groups=groups.ctypes.data,
        cap=cap,
        num_threads=kmeans.num_threads or torch.get_num_threads(),
        labels=capped.ctypes.data,
    )
    return capped
