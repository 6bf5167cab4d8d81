"""The prefix tree of semantic ids: one that never changes, and one that changes under readers."""

from onerec.trie.live_trie import Epoch, LiveTrie
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
    "ArrayLike",
    "DeviceTrie",
    "Epoch",
    "LiveTrie",
    "SidTrie",
    "as_int_array",
]
