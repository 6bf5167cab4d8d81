"""What a search under a trie may be asked, checked for all that search."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import numpy.typing as npt

from onerec.trie.sid_trie import EVERY_TAG, MAX_TAGS, SidTrie

SCORINGS = ("full_softmax", "legal_softmax", "raw")


def check_scoring(scoring: str, temperature: float) -> None:
    """Raises ValueError for an unknown scoring or a temperature out of range."""
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: wanted one of {SCORINGS}, got {scoring!r}")
    if not (0.0 < temperature < float("inf")):
        raise ValueError(f"temperature: wanted a positive finite number, got {temperature}")


def allow_masks(
    allow_tags: Sequence[int | None] | None, batch_size: int, trie: SidTrie
) -> npt.NDArray[np.uint64]:
    """For each request the tags that an item must have one of."""
    given = [None] * batch_size if allow_tags is None else allow_tags
    if isinstance(given, Integral) or not all(isinstance(t, Integral | None) for t in given):
        raise TypeError(
            f"allow_tags: wanted a set of tags as bits, or None, for each request, got {given!r}"
        )
    if len(given) != batch_size:
        raise ValueError(f"allow_tags: wanted {batch_size} sets of tags, got {len(given)}")
    for tags in given:
        if tags is not None and not 0 <= tags < EVERY_TAG:
            raise ValueError(f"allow_tags: wanted bits 0 to {MAX_TAGS - 1}, got {tags:#x}")
        if tags is not None and not trie.has_tags:
            raise ValueError(
                "allow_tags: the trie has no tags; see Catalog.with_tags, SidTrie.with_tags"
            )
    return np.array([EVERY_TAG if tags is None else tags for tags in given], dtype=np.uint64)
