"""Phase 6, the item vectors of a session set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onerec.data import text
from onerec.data.config import SessionConfig
from onerec.data.schema import bad
from onerec.data.session_set import list_values
from onerec.data.source import LogSource
from onerec.data.vectors import (
    FILL_RULE,
    Cooccurrence,
    VectorFile,
    align,
    cooccurrence,
    fill,
    fold_in,
)
from onerec.errors import DataError

_SAME = 0.1  # of the vectors' length: how far a vector may lie from the run's of the same item


def item_vectors(
    log: LogSource, config: SessionConfig, rule: str, train: Any
) -> tuple[npt.NDArray[np.float32], dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Item vectors [N, d], what the funnel says of them, and the arrays of `basis.npz`, by which
    later items get vectors in the same space (`later_vectors`)."""
    tags = [tags[0] if tags else None for tags in log.items["tags"].to_pylist()]
    name = config.embeddings
    if name == "auto":
        name = next(iter(log.vectors), "cooccurrence")
        if rule == "next" and name != "cooccurrence":
            name += "+cooccurrence"
    optional = config.embeddings == "auto" and "+" in name
    files = dict(log.vectors)
    if text.NAME in name.split("+"):
        files.setdefault(text.NAME, text.text_vectors(log.path, log.items, config.text_model))
    parts, about = [], []
    basis: dict[str, npt.NDArray[Any]] = {}
    filled = np.zeros(log.items.num_rows, dtype=np.bool_)
    for part in name.split("+"):
        if part == "cooccurrence":
            found = _cooccurrence(log, config, train)
            vectors, known = found.vectors, found.known
            if not known.any() and optional:
                name = name.removesuffix("+cooccurrence")
                continue
            if not known.any():
                raise DataError(f"{log.path}: no two items co-occur in a user's train sequence")
            vectors = fill(vectors, known, tags, config.seed)
            basis |= {"projection": found.projection, "context": found.context}
            about.append("co-occurrence in train sequences (PPMI, truncated SVD)")
        elif part in files:
            file = files[part]
            vectors, known = align(file, log.items["item_id"].to_numpy(), tags, config.seed)
            about.append(file.about)
        else:
            names = ", ".join(["auto", "cooccurrence", text.NAME, *log.vectors])
            raise ValueError(
                f"embeddings: wanted one of {names}, or several joined by '+', got {name!r}"
            )
        filled |= ~known
        parts.append(vectors)
    means = [np.zeros(part.shape[1], np.float32) for part in parts]
    scales = np.ones(len(parts))
    if len(parts) > 1:
        # Centred and of equal mean square, so that no part outweighs the others.
        means = [part.mean(axis=0) for part in parts]
        parts = [part - mean for part, mean in zip(parts, means, strict=True)]
        scales = np.array([np.sqrt((part**2).sum(axis=1).mean()) for part in parts])
        parts = [part / np.float32(scale) for part, scale in zip(parts, scales, strict=True)]
    basis |= {"scales": scales, **{f"mean.{at}": mean for at, mean in enumerate(means)}}
    vectors = np.concatenate(parts, axis=1)
    told = {
        "source": name,
        "about": " + ".join(about),
        "dim": vectors.shape[1],
        "filled": int(filled.sum()),
        "fill_rule": FILL_RULE if filled.any() else None,
    }
    return vectors, told, basis


def _cooccurrence(log: LogSource, config: SessionConfig, train: Any) -> Cooccurrence:
    sequences = (
        train.group_by("user_row")
        .aggregate(items=log.connection.collect(train.item_index, [train.timestamp, train.row]))
        .order_by("user_row")
        .to_pyarrow()
    )
    values, offsets = list_values(sequences["items"])
    return cooccurrence(
        values,
        offsets,
        log.items.num_rows,
        dim=config.embedding_dim,
        window=config.cooccurrence_window,
        seed=config.seed,
    )


def later_vectors(
    log: LogSource,
    config: SessionConfig,
    source: str,
    before: npt.NDArray[np.float32],
    items: pa.Table,
    basis: Mapping[str, npt.NDArray[Any]],
    sequences: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]],
) -> tuple[npt.NDArray[np.float32], int]:
    """Vectors of items that came after a run's own, in the space of these.

    Args:
        log: Of the new rows, with the vectors of new items under the run's names.
        config: Of the run.
        source: What the run's vectors were made from (`embeddings` in funnel.json).
        before: [N, d], the vectors of the items so far.
        items: All items, the new ones last: item_id, text, tags.
        basis: Of the run.
        sequences: Items of users around the new rows, and offsets.

    Returns:
        float32 [items - N, d], and how many were filled in part from items of the same tag.

    Raises:
        DataError: Vectors of another length, or of another space than the run's.
    """
    n, total = len(before), items.num_rows
    tags = [tags[0] if tags else None for tags in items["tags"].to_pylist()]
    ids = items["item_id"].to_numpy(zero_copy_only=False)
    filled = np.zeros(total - n, dtype=np.bool_)
    files = dict(log.vectors)
    if text.NAME in source.split("+"):
        made = text.text_vectors(log.path, items.slice(n), config.text_model)
        files.setdefault(text.NAME, made)
    parts, begin = [], 0
    for at, part in enumerate(source.split("+")):
        mean, scale = basis[f"mean.{at}"], np.float32(basis["scales"][at])
        old = before[:, begin : begin + len(mean)]
        begin += len(mean)
        known = np.zeros(total, dtype=np.bool_)
        raw = np.zeros((total, len(mean)), np.float32)
        if part == "cooccurrence":
            raw[len(basis["projection"]) :], known[len(basis["projection"]) :] = fold_in(
                *sequences,
                total,
                basis["projection"],
                basis["context"],
                window=config.cooccurrence_window,
            )
        elif part in files:
            raw, known = _given(files[part], ids, len(mean))
            _check_space(files[part].path, (raw[:n] - mean) / scale, old, known[:n], ids)
        vectors = (raw - mean) / scale
        vectors[:n] = old
        known[:n] = True
        parts.append(fill(vectors, known, tags, config.seed)[n:])
        filled |= ~known[n:]
    return np.concatenate(parts, axis=1), int(filled.sum())


def _given(
    file: VectorFile, item_ids: npt.NDArray[Any], width: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The vectors of a file in the order of items, and which items have one."""
    ids, vectors = file.load()
    if vectors.shape[1] != width:
        raise bad(
            file.path, f"wanted vectors of {width} numbers as the run's, got {vectors.shape[1]}"
        )
    at = {item: row for row, item in enumerate(ids.tolist())}
    rows = np.array([at.get(item, -1) for item in item_ids.tolist()], dtype=np.int64)
    out = np.zeros((len(item_ids), width), np.float32)
    out[rows >= 0] = vectors[rows[rows >= 0]]
    return out, rows >= 0


def _check_space(
    path: Path,
    here: npt.NDArray[np.float32],
    old: npt.NDArray[np.float32],
    known: npt.NDArray[np.bool_],
    ids: npt.NDArray[Any],
) -> None:
    """Refuses a file whose vectors of items that the run has are others than the run's."""
    both = np.flatnonzero(known)
    if not len(both):
        return
    apart = np.linalg.norm(here[both] - old[both], axis=1)
    limit = _SAME * np.sqrt((old**2).sum(axis=1).mean())
    if np.median(apart) > limit:
        item = ids[both[int(np.argmax(apart))]]
        raise bad(
            path,
            f"wanted vectors in the space of the run's, got others for {len(both)} items that the "
            f"run has, e.g. item {item!r}: made by another network or another fit?",
        )
