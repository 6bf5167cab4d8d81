"""Constrained beam steps in NumPy, float64: what the native ones are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


class LeafTable:
    """The distinct semantic ids in order, and the prefix ranks that number the trie's nodes."""

    def __init__(self, sids: npt.NDArray[Any]) -> None:
        self.sids = np.unique(np.asarray(sids, dtype=np.int64), axis=0)
        n, levels = self.sids.shape
        # rank[d][leaf] = node of depth d above the leaf.
        self.rank = [np.zeros(n, dtype=np.int64)]
        changed = np.zeros(n, dtype=bool)
        for level in range(levels):
            changed[1:] |= self.sids[1:, level] != self.sids[:-1, level]
            self.rank.append(np.cumsum(changed))

    def below(self, depth: int, node: int) -> tuple[int, int]:
        """Leaves [begin, end) below a node."""
        begin, end = np.searchsorted(self.rank[depth], [node, node + 1])
        return int(begin), int(end)

    def legal(self, depth: int, node: int, banned: Sequence[int]) -> tuple[Int, Int]:
        """Codes, ascending, that lead from a node to some leaf not banned; and their nodes."""
        begin, end = self.below(depth, node)
        live = np.setdiff1d(np.arange(begin, end), np.asarray(banned, dtype=np.int64))
        nodes, first = np.unique(self.rank[depth + 1][live], return_index=True)
        return self.sids[live[first], depth], nodes


def readable(logits: npt.NDArray[Any]) -> Float:
    """Logits by the stated rule: NaN is -inf, +inf is the largest finite float32."""
    values = np.asarray(logits, dtype=np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    return np.minimum(values, float(np.finfo(np.float32).max))


def log_sum_exp(values: Float) -> float:
    """log(sum(exp(values))); -inf for no values or only -inf."""
    top = values.max(initial=-np.inf)
    return float(top + np.log(np.exp(values - top).sum())) if np.isfinite(top) else -np.inf


def request_step(
    logits: npt.NDArray[Any],
    scores: Float,
    nodes: Sequence[int],
    table: LeafTable,
    depth: int,
    beam_width: int,
    scoring: str,
    temperature: float,
    banned: Sequence[Sequence[int]] | None = None,
) -> list[tuple[float, int, int, int]]:
    """One request's step over every continuation.

    Args:
        logits: [R, V], one row a beam.
        scores: [R].
        nodes: Node of each beam at `depth`; -1 for a dead one.
        table: The trie.
        depth: Codes that each beam already has.
        beam_width: Rows to keep.
        scoring: "full_softmax", "legal_softmax" or "raw".
        temperature: Divides the logits.
        banned: For each beam the leaves that it must not reach.

    Returns:
        (score, parent, token, child node), best first, at most `beam_width`; the order is score
        descending, then parent, then token.
    """
    found = []
    for parent, node in enumerate(nodes):
        if node < 0:
            continue
        tokens, children = table.legal(depth, node, banned[parent] if banned else ())
        row = readable(logits[parent]) / temperature
        norm = 0.0
        if scoring == "full_softmax":
            norm = log_sum_exp(row)
        elif scoring == "legal_softmax":
            norm = log_sum_exp(row[tokens])
        for token, child in zip(tokens.tolist(), children.tolist(), strict=True):
            if row[token] > -np.inf:
                found.append((float(scores[parent] + (row[token] - norm)), parent, token, child))
    found.sort(key=lambda c: (-c[0], c[1], c[2]))
    return found[:beam_width]
