"""Phase 6, the item vectors of a session set."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onerec.data import text
from onerec.data.config import SessionConfig
from onerec.data.session_set import list_values
from onerec.data.source import LogSource
from onerec.data.vectors import FILL_RULE, align, cooccurrence_vectors, fill
from onerec.errors import DataError


def item_vectors(
    log: LogSource, config: SessionConfig, rule: str, train: Any
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Item vectors [N, d] and what the funnel says of them."""
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
    filled = np.zeros(log.items.num_rows, dtype=np.bool_)
    for part in name.split("+"):
        if part == "cooccurrence":
            vectors, known = _cooccurrence(log, config, train)
            if not known.any() and optional:
                name = name.removesuffix("+cooccurrence")
                continue
            if not known.any():
                raise DataError(f"{log.path}: no two items co-occur in a user's train sequence")
            vectors = fill(vectors, known, tags, config.seed)
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
    if len(parts) > 1:
        # Centred and of equal mean square, so that no part outweighs the others.
        centred = [part - part.mean(axis=0) for part in parts]
        parts = [part / np.sqrt((part**2).sum(axis=1).mean()) for part in centred]
    vectors = np.concatenate(parts, axis=1)
    return vectors, {
        "source": name,
        "about": " + ".join(about),
        "dim": vectors.shape[1],
        "filled": int(filled.sum()),
        "fill_rule": FILL_RULE if filled.any() else None,
    }


def _cooccurrence(
    log: LogSource, config: SessionConfig, train: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    sequences = (
        train.group_by("user_row")
        .aggregate(items=log.connection.collect(train.item_index, [train.timestamp, train.row]))
        .order_by("user_row")
        .to_pyarrow()
    )
    values, offsets = list_values(sequences["items"])
    return cooccurrence_vectors(
        values,
        offsets,
        log.items.num_rows,
        dim=config.embedding_dim,
        window=config.cooccurrence_window,
        seed=config.seed,
    )
