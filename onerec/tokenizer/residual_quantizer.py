"""Residual quantisation: an item's semantic id is one balanced code for each level."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from onerec._native import core
from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.progress import Progress
from onerec.tokenizer.balanced_kmeans import (
    BalancedKMeans,
    Method,
    as_rows,
    positive,
    priced_argmin,
    seed_of,
    stride_of,
)
from onerec.tokenizer.rows import CHUNK

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
        device: Where the levels are fitted, see `BalancedKMeans`.

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
        device: str | torch.device | None = None,
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
        self.device = device

    def fit(
        self,
        X: ArrayLike | torch.Tensor,
        *,
        scratch: str | Path | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> ResidualQuantizer:
        """Fits the codebooks to X [N, d] (taken as float32) and codes its rows.

        For vectors that do not fit into memory: give what `open_rows` returns, and a `scratch`.

        Args:
            X: [N, d].
            scratch: Folder for the residual, a temporary file as large as X; None keeps it in
                memory.
            checkpoint: Folder for what is done, written after each Lloyd step; a fit of the same
                data that finds one goes on from it, to the same result. Needs a method other than
                "sequential".
            progress: Called as `progress(steps, levels * max_iter, note)` after each Lloyd step.

        Raises:
            TypeError: X is not numeric.
            ValueError: X has too few rows, values that are not finite, or more rows than there are
                ids while `distinct` asks for distinct ones.
            DataError: The checkpoint is damaged, or that of another fit.
        """
        x = as_rows(X)
        n, d = x.shape
        device = X.device if self.device is None and isinstance(X, torch.Tensor) else self.device
        if self.distinct in ("cap", "distinct") and n > self.codebook_size**self.levels:
            raise ValueError(
                f"X: wanted at most codebook_size ** levels = {self.codebook_size**self.levels} "
                f"rows for distinct={self.distinct!r}, got {n}"
            )
        seed = seed_of(self.random_state)
        if checkpoint is not None:
            seed = self._resume(Path(checkpoint) / "fit.json", [n, d], seed)
        generator = np.random.default_rng(seed)
        seeds = [seed_of(generator) for _ in range(self.levels)]
        codebooks = np.zeros((self.levels, self.codebook_size, d), np.float32)
        prices = np.zeros((self.levels, self.codebook_size), np.float64)
        sids = np.zeros((n, self.levels), np.int32)
        groups = np.zeros(n, np.int64)
        self.gaps_ = []
        errors: list[float] = []
        with _residual(x, scratch) as residual:
            for level in range(self.levels):
                saved = None if checkpoint is None else Path(checkpoint) / f"level{level}.npz"
                done = None if saved is None else _load_level(saved, x.shape, self.codebook_size)
                if done is None:
                    kmeans = BalancedKMeans(
                        self.codebook_size,
                        method=self.method,
                        max_iter=self.max_iter,
                        random_state=seeds[level],
                        num_threads=self.num_threads,
                        memory_budget=self.memory_budget,
                        device=device,
                    ).fit(
                        residual,
                        checkpoint=None if saved is None else saved.with_suffix(".part.npz"),
                        progress=_shifted(progress, level * self.max_iter, self),
                    )
                    codes, gap = kmeans.labels_, kmeans.gap_
                    last = level == self.levels - 1
                    if self.distinct == "distinct" or (self.distinct == "cap" and not last):
                        cap = self.codebook_size ** (self.levels - 1 - level)
                        codes = _capped(kmeans, residual, groups, cap, codes)
                    done = {
                        "centers": kmeans.cluster_centers_,
                        "prices": kmeans.prices_,
                        "codes": codes,
                        "gap": np.asarray(gap),
                    }
                    if saved is not None:
                        with atomic_write(saved) as path, path.open("wb") as file:
                            np.savez(
                                file,
                                centers=done["centers"],
                                prices=done["prices"],
                                codes=codes,
                                gap=done["gap"],
                            )
                        saved.with_suffix(".part.npz").unlink(missing_ok=True)
                codes = done["codes"]
                groups = _number(groups, codes)
                square = 0.0
                for start in range(0, n, CHUNK):
                    piece = residual[start : start + CHUNK]
                    piece -= done["centers"][codes[start : start + CHUNK]]
                    square += float(np.einsum("ij,ij->", piece, piece, dtype=np.float64))
                codebooks[level], prices[level] = done["centers"], done["prices"]
                sids[:, level] = codes
                self.gaps_.append(float(done["gap"]))
                errors.append(square / n)
        if self.distinct == "rank":
            sids = number_collisions(sids, self.codebook_size)
        self.codebooks_ = codebooks
        self.prices_ = prices
        self.sids_ = np.ascontiguousarray(sids)
        self.report_ = {"n_items": n, "mse": errors[-1], "mse_per_level": errors}
        self.report_.update(describe_ids(self.sids_, self.codebook_size))
        self.report_["gaps"] = self.gaps_
        return self

    def _resume(self, path: Path, shape: list[int], seed: int) -> int:
        """Says in `path` what is being fitted, or checks what it says; returns the seed."""
        task = {
            "shape": shape,
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "method": self.method,
            "distinct": self.distinct,
            "max_iter": self.max_iter,
            "seed": seed,
        }
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(task) + "\n", encoding="utf-8")
            return seed
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: wanted JSON, got {error}") from error
        for name, wanted in task.items():
            if found.get(name) != wanted and (name != "seed" or self.random_state is not None):
                raise DataError(
                    f"{path}: {name}: wanted a checkpoint for {wanted}, got {found.get(name)}"
                )
        return int(found["seed"])

    def encode(
        self,
        X: ArrayLike | torch.Tensor,
        *,
        progress: Progress | None = None,
    ) -> NDArray[np.int32]:
        """Codes of new items: at each level argmin_k |r - c_k|^2 + price_k.

        Args:
            X: [n, d], taken as float32; read in pieces of 65,536 rows.
            progress: Called as `progress(rows, n, "")` after each piece.

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
        sids = np.zeros((x.shape[0], self.levels + (self.distinct == "rank")), np.int32)
        for start in range(0, x.shape[0], CHUNK):
            residual = np.array(x[start : start + CHUNK], order="C")
            for level in range(self.levels):
                codes = priced_argmin(
                    residual, self.codebooks_[level], self.prices_[level], self.num_threads
                )
                residual -= self.codebooks_[level][codes]
                sids[start : start + CHUNK, level] = codes
            if progress is not None:
                progress(min(start + CHUNK, x.shape[0]), x.shape[0], "")
        return sids

    def add(
        self, X: ArrayLike | torch.Tensor, *, slack: float = 1.05, sids: ArrayLike | None = None
    ) -> NDArray[np.int32]:
        """Codes of new items under hard caps; the old items keep theirs.

        At each level a code takes at most ceil(slack * (N + M) / K) items, old ones included, by
        the cheapest assignment at the fitted prices. With distinct="distinct" that holds for all
        levels but the last; there an item whose id is taken gets the cheapest free one among those
        that share a prefix, the longest first. Where the caps leave no free id, they give way.

        Args:
            X: [M, d], taken as float32.
            slack: At least 1; 1 keeps the codes as even as they can be.
            sids: [N, L], or [N, L + 1] with "rank": the ids that are in use; those of the fit, and
                of what was added since, by default.

        Returns:
            int32 [M, L], or [M, L + 1] with "rank". `sids_` holds them too, behind the old ones.

        Raises:
            RuntimeError: There are no codebooks, or neither `sids` nor a fit says what is in use.
            ValueError: An argument is out of range, or no id is left.
        """
        self._fitted("add")
        if not slack >= 1:
            raise ValueError(f"slack: wanted at least 1, got {slack!r}")
        if sids is None and not hasattr(self, "sids_"):
            raise RuntimeError("add: wanted sids, the ids in use, since they are not saved")
        old = np.asarray(self.sids_ if sids is None else sids)
        width = self.levels + (self.distinct == "rank")
        if old.ndim != 2 or old.shape[1] != width or old.dtype.kind not in "iu":
            raise ValueError(f"sids: wanted integers of shape [n, {width}], got {list(old.shape)}")
        codes = old[:, : self.levels]
        if wrong := np.argwhere((codes < 0) | (codes >= self.codebook_size)).tolist():
            row, level = wrong[0]
            raise ValueError(
                f"sids: wanted codes in [0, {self.codebook_size}), got {codes[row, level]} in row "
                f"{row}, level {level}"
            )
        x = as_rows(X)
        if x.shape[1] != self.codebooks_.shape[2]:
            raise ValueError(f"X: wanted {self.codebooks_.shape[2]} columns, got {x.shape[1]}")
        total = len(old) + len(x)
        if self.distinct == "distinct" and total > self.codebook_size**self.levels:
            raise ValueError(
                f"X: wanted at most {self.codebook_size**self.levels - len(old)} rows, the ids "
                f"that are left, got {len(x)}"
            )
        cap = math.ceil(slack * total / self.codebook_size)
        residual = np.array(x, order="C")
        new = np.zeros((len(x), width), np.int32)
        free = []
        for level in range(self.levels):
            held = np.bincount(old[:, level], minlength=self.codebook_size)
            room = np.maximum(cap - held, 0).astype(np.int64)
            if self.distinct == "distinct" and level == self.levels - 1:
                room[:] = len(x)
            codes = np.zeros(len(x), np.int32)
            core().assign_within(
                x=residual.ctypes.data,
                rows=len(x),
                columns=x.shape[1],
                stride=stride_of(residual),
                centers=self.codebooks_[level].ctypes.data,
                clusters=self.codebook_size,
                prices=self.prices_[level].ctypes.data,
                room=room.ctypes.data,
                num_threads=self.num_threads or torch.get_num_threads(),
                labels=codes.ctypes.data,
            )
            residual -= self.codebooks_[level][codes]
            new[:, level] = codes
            free.append(room - np.bincount(codes, minlength=self.codebook_size))
        if self.distinct == "distinct":
            self._part(x, old, new, free)
        if self.distinct == "rank":
            self._rank_after(old, new)
        self.sids_ = np.concatenate([old, new]).astype(np.int32, copy=False)
        return new

    def _part(
        self,
        x: NDArray[np.float32],
        old: NDArray[Any],
        new: NDArray[np.int32],
        free: list[NDArray[np.int64]],
    ) -> None:
        """Gives items of `new` whose ids are taken the cheapest free ones, within `free` places."""
        taken = set(map(tuple, old.tolist()))
        for i, row in enumerate(new):
            if tuple(row.tolist()) in taken:
                for level, code in enumerate(row[:-1]):
                    free[level][code] += 1
                anywhere = [np.full_like(places, len(new)) for places in free]
                found = next(
                    sid
                    for places in (free, anywhere)
                    for keep in range(self.levels - 1, -1, -1)
                    if (sid := self._free_id(x[i], row[:keep], places, taken)) is not None
                )
                row[:] = found
                for level, code in enumerate(row[:-1]):
                    free[level][code] -= 1
            taken.add(tuple(row.tolist()))

    def _free_id(
        self,
        x: NDArray[np.float32],
        prefix: NDArray[np.int32],
        free: list[NDArray[np.int64]],
        taken: set[tuple[int, ...]],
    ) -> tuple[int, ...] | None:
        """The first free id below `prefix`, by the priced cost of one level after the other."""
        level = len(prefix)
        residual = x.astype(np.float64)
        for above, code in enumerate(prefix):
            residual -= self.codebooks_[above][code]
        costs = ((self.codebooks_[level] - residual) ** 2).sum(1) + self.prices_[level]
        for code in np.argsort(costs, kind="stable"):
            sid = (*prefix.tolist(), int(code))
            if level == self.levels - 1:
                if sid not in taken:
                    return sid
            elif free[level][code] > 0:
                found = self._free_id(x, np.array(sid, np.int32), free, taken)
                if found is not None:
                    return found
        return None

    def _rank_after(self, old: NDArray[Any], new: NDArray[np.int32]) -> None:
        """Numbers items of one id on from those that hold it."""
        held = Counter(map(tuple, old[:, :-1].tolist()))
        for row in new:
            key = tuple(row[:-1].tolist())
            if held[key] == self.codebook_size:
                raise ValueError(
                    f'distinct="rank": wanted at most codebook_size = {self.codebook_size} items '
                    f"on an id, got more on {key}"
                )
            row[-1] = held[key]
            held[key] += 1

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

    @property
    def fingerprint(self) -> str:
        """Of the codebooks and prices, 32 hexadecimal digits: `Catalog.build(quantizer=...)`."""
        self._fitted("fingerprint")
        return fingerprint(self.codebooks_, self.prices_)

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
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ResidualQuantizer:
        """Reads what `save_pretrained` wrote; `encode` and `decode` work, `sids_` is not kept.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The files are not a quantizer's, or do not agree.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        directory = Path(directory)
        config_path = directory / "config.json"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{config_path}: wanted JSON, got {error}") from error
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ValueError(f"{config_path}: wanted a quantizer's config of format {_FORMAT}")
        try:
            tensors = load_file(directory / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{directory / 'model.safetensors'}: {error}") from error
        wanted_fields = {"levels": int, "codebook_size": int, "dimension": int, "max_iter": int}
        for name, kind in {**wanted_fields, "method": str, "distinct": str, "report": dict}.items():
            if type(config.get(name)) is not kind:
                raise ValueError(
                    f"{config_path}: {name}: wanted {kind.__name__}, got {config.get(name)!r}"
                )
        try:
            quantizer = cls(
                config["levels"],
                config["codebook_size"],
                method=config["method"],
                distinct=config["distinct"],
                max_iter=config["max_iter"],
            )
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from None
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
            if not np.isfinite(found).all():
                raise ValueError(f"{directory / 'model.safetensors'}: {name}: wanted finite values")
        quantizer.codebooks_ = tensors["codebooks"]
        quantizer.prices_ = tensors["prices"]
        quantizer.report_ = config["report"]
        return quantizer


def fingerprint(*arrays: NDArray[Any]) -> str:
    """A digest of arrays, their shapes and types: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def number_collisions(sids: NDArray[np.int32], codebook_size: int) -> NDArray[np.int32]:
    """Ids int32 [N, L + 1] whose last column numbers the items of an id, in their order.

    Raises:
        ValueError: An id has more items than a level has codes.
    """
    groups = np.unique(sids, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    if sizes.max() > codebook_size:
        raise ValueError(
            f'distinct="rank": wanted at most codebook_size = {codebook_size} items on an '
            f"id, got {sizes.max()}; use more levels, a larger codebook or "
            f'distinct="distinct"'
        )
    ranks = np.empty(len(groups), np.int32)
    ranks[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.concatenate([sids, ranks[:, None]], axis=1)


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


@contextmanager
def _residual(x: NDArray[np.float32], scratch: str | Path | None) -> Iterator[NDArray[np.float32]]:
    """A writable copy of x, in memory or in a file of `scratch` that goes at the end."""
    if scratch is None:
        yield np.array(x, order="C")
        return
    Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch, prefix=".residual.") as file:
        rows = np.memmap(file, np.float32, "w+", shape=x.shape)
        for start in range(0, len(x), CHUNK):
            rows[start : start + CHUNK] = x[start : start + CHUNK]
        yield rows


def _load_level(
    path: Path, shape: tuple[int, ...], codebook_size: int
) -> dict[str, NDArray[Any]] | None:
    """A finished level of a checkpoint, or None if there is none.

    Raises:
        DataError: The file is damaged, or belongs to another fit.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            level = {name: saved[name] for name in ("centers", "prices", "codes", "gap")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: wanted a finished level, got {error}") from error
    wanted = ((codebook_size, shape[1]), (codebook_size,), (shape[0],))
    found = tuple(level[name].shape for name in ("centers", "prices", "codes"))
    if found != wanted:
        raise DataError(f"{path}: wanted a level of shapes {wanted}, got {found}")
    return level


def _shifted(
    progress: Progress | None, before: int, quantizer: ResidualQuantizer
) -> Progress | None:
    """`progress` of one level as that of all."""
    if progress is None:
        return None
    total = quantizer.levels * quantizer.max_iter
    return lambda steps, _, note: progress(before + steps, total, note)


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
