"""The prefix tree of semantic ids: one that never changes, and one that changes under readers."""

from __future__ import annotations

from onerec.trie.live_trie import Epoch, LiveTrie
from onerec.trie.options import SCORINGS, allow_masks, check_scoring
from onerec.trie.sid_trie import (
    EVERY_TAG,
    MAX_CODEBOOK_SIZE,
    MAX_LEVELS,
    MAX_TAGS,
    ArrayLike,
    DeviceTrie,
    SidTrie,
    as_int_array,
)

__all__ = [
    "EVERY_TAG",
    "MAX_CODEBOOK_SIZE",
    "MAX_LEVELS",
    "MAX_TAGS",
    "SCORINGS",
    "ArrayLike",
    "DeviceTrie",
    "Epoch",
    "LiveTrie",
    "SidTrie",
    "allow_masks",
    "as_int_array",
    "check_scoring",
]
