"""Item vectors: read from files, made from co-occurrence, and filled where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from onerec.data.schema import bad

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorFile:
    """A file of item vectors.

    Args:
        path: `.npy` (float [N, d], row = row of the items file) or `.npz` (`item_ids` [n] and
            `vectors` [n, d]).
        item_ids: For `.npy` and a column, the item id of each row; None for `.npz`.
        about: Where the vectors come from, for reports.
        column: For a Parquet file, the column of lists, all of one length (null where an item has
            none).
        parts: The Parquet files that hold the column; none: `path` alone.
    """

    path: Path
    item_ids: npt.NDArray[Any] | None
    about: str
    column: str | None = None
    parts: tuple[Path, ...] = ()

    def load(self) -> tuple[npt.NDArray[Any], Floats]:
        """Reads and checks the file.

        Returns:
            Item ids [n] and vectors float32 [n, d].

        Raises:
            DataError: The file is missing or cut short, has another length than the items file,
                repeats an id, or holds NaN or infinity.
        """
        if self.column is not None:
            return self._load_column(self.column)
        if not self.path.is_file():
            raise bad(self.path, "there is no such file")
        try:
            # An open file of ours is closed even where NumPy fails on a damaged archive.
            with self.path.open("rb") as file:
                data = np.load(file, allow_pickle=False)
                arrays = {key: data[key] for key in data} if self.path.suffix == ".npz" else {}
        except Exception as error:  # zipfile and zlib errors among them
            raise bad(self.path, f"not a whole {self.path.suffix} file: {error}") from error
        if self.path.suffix == ".npz":
            missing = {"item_ids", "vectors"} - set(arrays)
            if missing:
                raise bad(
                    self.path,
                    f"wanted the arrays item_ids and vectors, got {', '.join(sorted(arrays))}",
                )
            ids, vectors = arrays["item_ids"], arrays["vectors"]
        else:
            ids, vectors = self.item_ids, data
        if vectors.ndim != 2 or vectors.dtype.kind != "f" or not vectors.size:
            raise bad(self.path, f"wanted floats [N, d], got {vectors.dtype} {list(vectors.shape)}")
        if ids is None:
            raise bad(self.path, "a .npy file needs items.parquet, which gives the order of rows")
        if len(ids) != len(vectors):
            raise bad(
                self.path, f"wanted {len(ids)} rows (one an item id), got {len(vectors)} vectors"
            )
        return ids, checked(self.path, ids, vectors)

    def _load_column(self, name: str) -> tuple[npt.NDArray[Any], Floats]:
        assert self.item_ids is not None
        column = pa.chunked_array(
            [
                chunk
                for part in self.parts or (self.path,)
                for chunk in pq.read_table(part, columns=[name])[name].chunks
            ]
        )
        given = column.is_valid().to_numpy()
        if not given.any():
            raise bad(self.path, "every vector is null", column=name)
        lists = column.drop_null().combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        wrong = (lengths != lengths[0]) | (lengths == 0)
        if wrong.any():
            first = int(wrong.argmax())
            raise bad(
                self.path,
                f"wanted vectors of one length, {lengths[0]} as the first, got {lengths[first]} "
                "numbers",
                column=name,
                row=int(np.flatnonzero(given)[first]),
            )
        values = lists.flatten().to_numpy(zero_copy_only=False)
        ids = self.item_ids[given]
        return ids, checked(self.path, ids, values.reshape(len(ids), int(lengths[0])))


def checked(path: Path, ids: npt.NDArray[Any], vectors: npt.NDArray[Any]) -> Floats:
    """The vectors as float32, once ids are known to be distinct and values finite.

    Raises:
        DataError: With the first bad row.
    """
    # NaN is not at most anything.
    wrong = ~(np.abs(vectors) <= np.finfo(np.float32).max).all(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise bad(
            path,
            "wanted finite numbers, got NaN or infinity (or more than float32 holds) in the "
            f"vector of item {ids[row]}",
            row=row,
        )
    if len(np.unique(ids)) != len(ids):
        _, first = np.unique(ids, return_index=True)
        row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise bad(path, f"item id {ids[row]} occurs twice", row=row)
    return np.ascontiguousarray(vectors, dtype=np.float32)


FILL_RULE = (
    "mean of the vectors of the items with the same first tag (of all items where none has it), "
    "plus seeded noise of a tenth of the vectors' spread"
)


def align(
    file: VectorFile, item_ids: npt.NDArray[Any], tags: Sequence[str | None], seed: int
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The vectors of a file in the order of the items, missing ones filled by `FILL_RULE`.

    Args:
        file: Of the vectors.
        item_ids: Item id of each item [N].
        tags: First tag of each item, or None [N].
        seed: Of the noise.

    Returns:
        float32 [N, d], and bool [N]: which items the file has a vector for.

    Raises:
        DataError: The file is bad, or no item of the log is in it.
    """
    ids, vectors = file.load()
    at = {item: row for row, item in enumerate(ids.tolist())}
    rows = np.array([at.get(item, -1) for item in item_ids.tolist()], dtype=np.int64)
    known = rows >= 0
    if not known.any():
        raise bad(
            file.path,
            f"no item of the log has a vector here (first id {next(iter(at))!r}, "
            f"the log's {item_ids[:1].tolist()[0]!r})",
        )
    out = np.zeros((len(item_ids), vectors.shape[1]), dtype=np.float32)
    out[known] = vectors[rows[known]]
    return fill(out, known, tags, seed), known


def fill(
    vectors: Floats, known: npt.NDArray[np.bool_], tags: Sequence[str | None], seed: int
) -> Floats:
    """Fills the rows that are not `known` by `FILL_RULE`, in place.

    Raises:
        ValueError: No row is known.
    """
    if not known.any():
        raise ValueError("vectors: wanted at least one item with a vector, got none")
    if known.all():
        return vectors
    names, tag = np.unique([name or "" for name in tags], return_inverse=True)
    counts = np.bincount(tag[known], minlength=len(names))
    sums = np.zeros((len(names), vectors.shape[1]))
    np.add.at(sums, tag[known], vectors[known])
    means = np.where(
        counts[:, None] > 0,
        sums / np.maximum(counts, 1)[:, None],
        vectors[known].mean(axis=0, dtype=np.float64),
    )
    if (names == "").any():  # items without a tag have nothing in common
        means[names == ""] = vectors[known].mean(axis=0, dtype=np.float64)
    missing = ~known
    noise = np.random.default_rng(seed).standard_normal((int(missing.sum()), vectors.shape[1]))
    spread = vectors[known].std(axis=0, dtype=np.float64)
    vectors[missing] = means[tag[missing]] + 0.1 * spread * noise
    return vectors


@dataclass(frozen=True)
class Cooccurrence:
    """Vectors of items from who is consumed near whom, and the space that they lie in.

    Args:
        vectors: float32 [N, d]; zero for an item without a pair.
        known: bool [N], whether an item had a pair.
        projection: float32 [N, d]: a row of the matrix of mutual information times it is the vector
            of that row's item, so that later items are folded in (`fold_in`).
        context: float64 [N], the smoothed share of each item among all contexts.
    """

    vectors: Floats
    known: npt.NDArray[np.bool_]
    projection: Floats
    context: npt.NDArray[np.float64]


def cooccurrence(
    values: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    n_items: int,
    *,
    dim: int = 64,
    window: int = 5,
    seed: int = 0,
) -> Cooccurrence:
    """Item vectors from who is consumed near whom: PPMI and a truncated SVD.

    Pairs at distance k <= `window` in a user's sequence count 1/k; the matrix of positive
    pointwise mutual information (context counts to the power 0.75) is factored by a randomised
    symmetric eigendecomposition, and a vector is U sqrt(|lambda|) (Levy, Goldberg and Dagan,
    TACL 2015; Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).

    Args:
        values: int32, all users' items one after another (train positions only).
        offsets: int64 [users + 1].
        n_items: N.
        dim: d; fewer where N is smaller.
        window: Largest distance of a pair.
        seed: Of the random projection; equal seeds give equal vectors.

    Returns:
        The vectors and what folds later items in.
    """
    dim = min(dim, n_items)
    left, right, weight = _pairs(values, offsets, n_items, window)
    marginal = np.bincount(left, weights=weight, minlength=n_items)
    if not len(left):
        nothing = np.zeros((n_items, dim), dtype=np.float32)
        return Cooccurrence(nothing, nothing[:, 0] > 0, nothing, np.zeros(n_items))
    context = np.asarray(marginal**0.75, dtype=np.float64)
    context /= context.sum()
    pmi = np.log(weight / (marginal[left] * context[right]))
    # The smoothing makes the matrix slightly asymmetric; both halves count the same.
    mirror = np.log(weight / (marginal[right] * context[left]))
    ppmi = np.maximum(0.5 * (pmi + mirror), 0.0)
    keep = ppmi > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([left[keep], right[keep]])),
        torch.from_numpy(ppmi[keep]),
        (n_items, n_items),
        is_coalesced=True,
        check_invariants=False,
    )
    start = np.random.default_rng(seed).standard_normal((n_items, min(n_items, dim + 16)))
    basis = torch.linalg.qr(torch.sparse.mm(matrix, torch.from_numpy(start)))[0]
    for _ in range(8):
        basis = torch.linalg.qr(torch.sparse.mm(matrix, basis))[0]
    small = basis.T @ torch.sparse.mm(matrix, basis)
    eigenvalues, rotation = torch.linalg.eigh(0.5 * (small + small.T))
    top = torch.argsort(eigenvalues.abs(), descending=True, stable=True)[:dim]
    vectors = (basis @ rotation[:, top]) * eigenvalues[top].abs().sqrt()
    # An eigenvector's sign is free: its largest component is made positive.
    peak = vectors.abs().argmax(dim=0)
    vectors = vectors * torch.sign(vectors[peak, torch.arange(len(top))])
    out = np.zeros((n_items, dim), dtype=np.float32)
    out[:, : len(top)] = vectors.numpy()
    values_of = eigenvalues[top].abs().clamp(min=1e-12)
    projection = np.zeros_like(out)
    projection[:, : len(top)] = (vectors * torch.sign(eigenvalues[top]) / values_of).numpy()
    return Cooccurrence(out, np.asarray(marginal > 0), projection, context)


def fold_in(
    values: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    n_items: int,
    projection: Floats,
    context: npt.NDArray[np.float64],
    *,
    window: int = 5,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Vectors of items that came after `cooccurrence`, in the same space.

    Args:
        values: int32, the users' items one after another; the items of `projection` have the
            indices below N, the later ones N and more.
        offsets: int64 [users + 1].
        n_items: Items in all.
        projection: [N, d], as of `Cooccurrence`.
        context: [N], as of `Cooccurrence`.
        window: Largest distance of a pair.

    Returns:
        float32 [n_items - N, d], and whether an item had a pair with an item of `projection`.
    """
    first = len(projection)
    left, right, weight = _pairs(values, offsets, n_items, window)
    inside = (left >= first) & (right < first)
    left, right, weight = left[inside] - first, right[inside], weight[inside]
    kept = context[right] > 0
    left, right, weight = left[kept], right[kept], weight[kept]
    marginal = np.bincount(left, weights=weight, minlength=n_items - first)
    ppmi = np.maximum(np.log(weight / (marginal[left] * context[right])), 0.0)
    out = np.zeros((n_items - first, projection.shape[1]))
    np.add.at(out, left, ppmi[:, None] * projection[right])
    return out.astype(np.float32), np.asarray(marginal > 0)


def _pairs(
    values: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], n_items: int, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Symmetric pair weights in row-major order; an item is no pair with itself."""
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    codes = np.empty(0, dtype=np.int64)
    weights: npt.NDArray[np.float64] = np.empty(0)
    for distance in range(1, window + 1):
        a, b = values[:-distance].astype(np.int64), values[distance:].astype(np.int64)
        together = (user[:-distance] == user[distance:]) & (a != b)
        a, b = a[together], b[together]
        new, counts = np.unique(
            np.concatenate([a * n_items + b, b * n_items + a]), return_counts=True
        )
        codes, inverse = np.unique(np.concatenate([codes, new]), return_inverse=True)
        together_weights = np.concatenate([weights, counts / distance])
        weights = np.asarray(np.bincount(inverse, weights=together_weights), dtype=np.float64)
    return codes // n_items, codes % n_items, weights
