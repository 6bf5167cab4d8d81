"""Requests, and which items of a catalogue each of them may get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onerec.model.config import OneRecConfig
from onerec.tokenizer import Catalog

ItemId = Any  # int or str, as in the catalogue
Tags = Sequence[str | int]  # words, or numbers
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """One history as the model sees it, and what it must not get.

    Attributes:
        place: Position in the caller's list.
        history: int64 [n], item indices, oldest first.
        codes: int64 [S, L], or [S, L + 1] with the item's index last.
        excluded: Item indices, sorted.
        denied: Leaves with an excluded item and none that it may get, sorted.
        allow: Tags of which an item must have one, or None.
        items: Items that its session can have.
    """

    place: int
    history: _Ints
    codes: _Ints
    excluded: _Ints
    denied: _Ints
    allow: int | None
    items: int


class Rules:
    """The rules of `Recommender` for histories, exclusions, tags and shared semantic ids.

    Args:
        catalog: The items.
        config: Of the network.
    """

    def __init__(self, catalog: Catalog, config: OneRecConfig) -> None:
        self.catalog, self.config = catalog, config
        trie = catalog.trie
        none = np.empty(0, np.int64)
        self._retired = none if catalog.retired is None else np.flatnonzero(catalog.retired)
        # Empty where there are no tags: a request with some is refused then.
        self._leaf_tags = trie.tags.astype(np.int64) if trie.has_tags else np.empty(0, np.int64)
        self._item_tags = self._leaf_tags
        if trie.has_tags:
            given = catalog.tags
            self._item_tags = self._leaf_tags[catalog.leaf_of_item] if given is None else given

    def requests(
        self,
        histories: Sequence[Sequence[ItemId]],
        exclude: Sequence[Sequence[ItemId]] | None,
        exclude_history: bool,
        length: int,
        allow_tags: Sequence[Tags | None] | None = None,
    ) -> list[Request]:
        """A request for each history, in their order; arguments as for `Recommender.recommend`.

        Raises:
            ValueError: Another number of exclusions or tags than of histories, or unknown tags.
            TypeError: Item ids of another kind than the catalogue's.
        """
        if exclude is not None:
            exclude = [list(one) if isinstance(one, Iterator) else one for one in exclude]
        if allow_tags is not None:
            allow_tags = list(allow_tags)
        if exclude is not None and len(exclude) != len(histories):
            raise ValueError(
                f"exclude must have a list for each of {len(histories)} histories, "
                f"got {len(exclude)}"
            )
        if allow_tags is not None and len(allow_tags) != len(histories):
            raise ValueError(
                f"allow_tags must have a list of tags, or None, for each of {len(histories)} "
                f"histories, got {len(allow_tags)}"
            )
        requests = []
        for place, history in enumerate(histories):
            known = self._known("histories", place, history)
            excluded = known if exclude_history else known[:0]
            if exclude is not None:
                excluded = np.concatenate([excluded, self._known("exclude", place, exclude[place])])
            excluded = np.unique(np.concatenate([excluded, self._retired]))
            allow = None
            if allow_tags is not None and (tags := allow_tags[place]) is not None:
                try:
                    allow = self.catalog.tag_bits(tags)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"allow_tags[{place}]: {error}") from None
            denied = self._exhausted(excluded, allow)
            window = known[-self.config.history_length :]
            codes = self.catalog.sids[window].astype(np.int64)
            if self.config.n_items:
                codes = np.concatenate([codes, window[:, None]], axis=1)
            left = self._left(denied, allow, length)
            requests.append(Request(place, known, codes, excluded, denied, allow, left))
        return requests

    def allowed(self, items: _Ints, excluded: _Ints, allow: int | None) -> npt.NDArray[np.bool_]:
        """Which of these items a request with `excluded` and `allow` may get, of their shape."""
        found = ~np.isin(items, excluded)
        return found if allow is None else found & (self._item_tags[items] & allow != 0)

    def free(self, leaf: int, request: Request) -> _Ints:
        """Items of a leaf that the search found that the request may get, ascending."""
        items = self.catalog.leaf_items(leaf)
        if len(items) == 1:  # or the search would not have found it
            return items
        return items[self.allowed(items, request.excluded, request.allow)]

    def first(self, leaves: _Ints, request: Request) -> _Ints:
        """Of each leaf that the search found the first item that the request may get."""
        items = self.catalog.leaf_item_indices[self.catalog.leaf_offsets[leaves]]
        taken = ~self.allowed(items, request.excluded, request.allow)
        for at in zip(*np.nonzero(taken), strict=True):
            items[at] = self.free(int(leaves[at]), request)[0]
        return items

    def _known(self, name: str, place: int, ids: Sequence[ItemId]) -> _Ints:
        if isinstance(ids, str):
            raise TypeError(f"{name}[{place}] must be a list of item ids, got the string {ids!r}")
        try:
            found = self.catalog.find(ids)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}[{place}]: {error}") from None
        return found[found >= 0]

    def _exhausted(self, excluded: _Ints, allow: int | None) -> _Ints:
        """Leaves that have an item in `excluded` (distinct) and none that may be shown, sorted."""
        leaves, counts = np.unique(self.catalog.leaf_of_item[excluded], return_counts=True)
        offsets = self.catalog.leaf_offsets
        out = counts == offsets[leaves + 1] - offsets[leaves]
        if allow is not None:  # a shared leaf may lack the tags among the items that are left
            for i in np.flatnonzero(~out):
                items = self.catalog.leaf_items(int(leaves[i]))
                out[i] = not self.allowed(items, excluded, allow).any()
        exhausted: _Ints = leaves[out]
        return exhausted

    def _left(self, denied: _Ints, allow: int | None, most: int) -> int:
        """How many leaves a request may still get, at most `most`."""
        leaves = self.catalog.trie.n_leaves
        if allow is None:
            return min(most, leaves - len(denied))
        left, block = 0, 4096
        for start in range(0, leaves, block):
            tagged = np.flatnonzero(self._leaf_tags[start : start + block] & allow) + start
            left += len(np.setdiff1d(tagged, denied))
            if left >= most:
                return most
        return left
