"""A catalogue that changes while readers decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from onerec._native import core
from onerec.trie.sid_trie import ArrayLike, SidTrie, as_int_array

if TYPE_CHECKING:
    from onerec import _C


class Epoch(NamedTuple):
    """A trie as it was between two changes.

    Attributes:
        id: Number of changes before it.
        trie: Never changes; leaf ids are those of this trie.
    """

    id: int
    trie: SidTrie


class LiveTrie:
    """The trie of the moment, for any number of readers and writers.

    A reader pins an epoch and keeps it for as long as it decodes; it never sees half a change. Each
    change makes another trie aside and puts it in its place at once, and waits for other changes;
    readers wait for nobody.

    Insertions build the whole trie anew, and leaf ids are then new: map leaves to items by the
    epoch that gave them, or by `BeamResult.sids`. Removals keep the bytes and the leaf ids and take
    microseconds.

    Args:
        trie: What to begin with.
    """

    def __init__(self, trie: SidTrie) -> None:
        self._native: _C.LiveTrie = core().LiveTrie(trie.native)
        self._levels = trie.levels

    def pin(self) -> Epoch:
        """The epoch of the moment."""
        number, native = self._native.pin()
        return Epoch(number, SidTrie(native))

    def insert(self, sids: ArrayLike, tags: ArrayLike | None = None) -> int:
        """Adds semantic ids [n, L] and returns the new epoch's id.

        Args:
            sids: Integers; those that are there already get the new tags beside their own.
            tags: Integers [n] as in `SidTrie.with_tags`; None adds none.

        Raises:
            TypeError: They are not integers.
            ValueError: A shape or code out of range.
        """
        array = self._sids(sids)
        address = 0
        if tags is not None:
            bits = as_int_array("tags", tags, np.int64, 1)
            if len(bits) != len(array):
                raise ValueError(f"tags: wanted one for each of {len(array)} sids, got {len(bits)}")
            address = bits.ctypes.data
        return self._native.insert(array.ctypes.data, len(array), self._levels, address)

    def remove(self, sids: ArrayLike) -> int:
        """Takes semantic ids [n, L] away, whichever are there, and returns the new epoch's id.

        Call `fold` when the removed ones are no longer few: a search whose request has filters of
        its own looks at all of them when it starts.

        Raises:
            TypeError: They are not integers.
            ValueError: They do not have L codes.
        """
        array = self._sids(sids)
        return self._native.remove(array.ctypes.data, len(array), self._levels)

    def fold(self) -> int:
        """Builds the trie without the removed leaves; returns the new epoch's id."""
        return self._native.fold()

    def swap(self, trie: SidTrie) -> int:
        """Puts another trie in place; returns the new epoch's id.

        Raises:
            ValueError: Its levels or codebook size differ.
        """
        return self._native.swap(trie.native)

    def rollback(self) -> int:
        """Puts the trie before the last change in place again; returns the new epoch's id.

        Raises:
            RuntimeError: There was no change.
        """
        return self._native.rollback()

    def _sids(self, sids: ArrayLike) -> npt.NDArray[np.int32]:
        array = as_int_array("sids", sids, np.int32, 2)
        if array.shape[1] != self._levels:
            raise ValueError(f"sids: wanted [n, {self._levels}], got shape {array.shape}")
        return array
