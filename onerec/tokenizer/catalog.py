"""Which items there are, and which semantic id each of them has."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.errors import DataError
from onerec.files import atomic_write, is_regular
from onerec.trie import MAX_TAGS, ArrayLike, SidTrie, as_int_array

_WORDS = b"onerec.tag_words"  # in the metadata of catalog.parquet
_QUANTIZER = b"onerec.quantizer"


class Catalog:
    """Item ids, their semantic ids, and the trie of these; several items may share a semantic id.

    Made by `build` or `load`. An item's index is its position in `item_ids`; a leaf is the rank of
    a distinct semantic id.

    Attributes:
        item_ids: int64 [N], or object [N] of str.
        sids: int32 [N, L].
        codebook_size: Codes of a level, K.
        levels: Codes of a semantic id, L.
        trie: The distinct semantic ids.
        leaf_of_item: int64 [N].
        leaf_offsets: int64 [leaves + 1]; the items of leaf i are
            `leaf_item_indices[leaf_offsets[i] : leaf_offsets[i + 1]]`, ascending.
        leaf_item_indices: int64 [N].
        tags: int64 [N], a set of tags of each item as bits 0 to 62, or None; the trie then has
            them too, a leaf those of all its items.
        tag_words: The word of tag t at place t; empty where tags have numbers alone.
        quantizer: Fingerprint of the quantizer that gave the semantic ids; empty where unknown.
        retired: bool [N], which items are known, so that histories have them, but never
            recommended; None for none.
        fingerprint: Of item ids, semantic ids and retired items, hexadecimal digits.
    """

    def __init__(
        self,
        item_ids: npt.NDArray[Any],
        sids: npt.NDArray[np.int32],
        trie: SidTrie,
        tags: npt.NDArray[np.int64] | None = None,
        tag_words: tuple[str, ...] = (),
        quantizer: str = "",
        retired: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.retired = retired if retired is not None and retired.any() else None
        self.item_ids, self.sids, self.tags, self.tag_words = item_ids, sids, tags, tag_words
        self.codebook_size, self.levels = trie.codebook_size, trie.levels
        self.leaf_of_item = trie.lookup(sids)
        if tags is not None:
            of_leaf = np.zeros(trie.n_leaves, dtype=np.int64)
            np.bitwise_or.at(of_leaf, self.leaf_of_item, tags)
            trie = trie.with_tags(of_leaf)
        self.trie = trie
        counts = np.bincount(self.leaf_of_item, minlength=trie.n_leaves)
        self.leaf_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.leaf_item_indices = np.argsort(self.leaf_of_item, kind="stable").astype(np.int64)
        if self.item_ids.dtype == object:
            self._index = {item: i for i, item in enumerate(item_ids.tolist())}
        else:
            self._order = np.argsort(item_ids, kind="stable")
            self._sorted = item_ids[self._order]

    @functools.cached_property
    def fingerprint(self) -> str:
        ids: Any = self.item_ids
        text = json.dumps(ids.tolist()).encode() if ids.dtype == object else ids.tobytes()
        digest = hashlib.blake2b(text, digest_size=16)
        digest.update(np.ascontiguousarray(self.sids).tobytes())
        if self.retired is not None:
            digest.update(self.retired.tobytes())
        return digest.hexdigest()

    @classmethod
    def build(
        cls, item_ids: ArrayLike, sids: ArrayLike, codebook_size: int, *, quantizer: str = ""
    ) -> Catalog:
        """Builds from item ids [N] (integers or strings) and semantic ids [N, L].

        Args:
            item_ids: Each once.
            sids: Codes in [0, codebook_size).
            codebook_size: Codes of a level.
            quantizer: `fingerprint` of the quantizer of `sids`; a network that was trained on the
                ids of one quantizer serves no catalogue of another.

        Raises:
            TypeError: Ids that are neither integers nor strings; codes that are not integers.
            ValueError: Lengths differ, an item id comes twice, a code is out of range.
        """
        ids = _item_ids(item_ids)
        codes = as_int_array("sids", sids, np.int32, 2)
        if len(ids) != len(codes):
            raise ValueError(f"sids: wanted a row for each of {len(ids)} items, got {len(codes)}")
        _check_ids(ids)
        return cls(ids, codes, SidTrie.build(codes, codebook_size), quantizer=quantizer)

    def retire(self, item_ids: ArrayLike) -> Catalog:
        """The same items, of which these are no longer recommended; histories still have them.

        Raises:
            ValueError: An id that the catalogue lacks.
        """
        retired = np.zeros(len(self), np.bool_) if self.retired is None else self.retired.copy()
        retired[self.index_of(item_ids)] = True
        return self._with(self.tags, self.tag_words, retired)

    def _with(
        self,
        tags: npt.NDArray[np.int64] | None,
        words: tuple[str, ...],
        retired: npt.NDArray[np.bool_] | None,
    ) -> Catalog:
        return type(self)(self.item_ids, self.sids, self.trie, tags, words, self.quantizer, retired)

    def with_tags(
        self,
        tags: ArrayLike | Sequence[str | Sequence[str] | None],
        words: Sequence[str] | None = None,
    ) -> Catalog:
        """The same items with a set of tags each, for `allow_tags` of `Recommender`.

        Args:
            tags: For each item a word, a list of words, or None; or integers [N], bit t (0 to 62)
                of which tells whether the item has tag t.
            words: The word of each tag. None: the words of the items in alphabetical order, or none
                for integers. Words of items that are not among them are left out.

        Raises:
            TypeError: `tags` are neither integers nor words.
            ValueError: Another number of them, bits out of range, over 63 words, or one twice.
        """
        if isinstance(tags, Iterator):
            tags = list(tags)
        if len(tags) != len(self):
            raise ValueError(f"tags: wanted one for each of {len(self)} items, got {len(tags)}")
        first = next((one for one in tags if one is not None), "")
        if not isinstance(first, str | list | tuple | np.ndarray):
            bits = as_int_array("tags", tags, np.int64, 1)
            named = _tag_words(() if words is None else words)
            most = (1 << (len(named) or MAX_TAGS)) - 1
            for wrong in bits[(bits < 0) | (bits > most)][:1]:
                raise ValueError(f"tags: wanted bits 0 to {most.bit_length() - 1}, got {wrong}")
            return self._with(bits, named, self.retired)
        sets = [_tags_of(one) for one in tags]
        if not all(isinstance(word, str) for one in sets for word in one):
            raise TypeError("tags: wanted for each item a word, a list of words, or None")
        named = _tag_words(
            sorted({word for one in sets for word in one}) if words is None else words
        )
        bit = {word: 1 << t for t, word in enumerate(named)}
        found = [sum({bit.get(word, 0) for word in one}) for one in sets]
        bits = np.array(found, dtype=np.int64)
        return self._with(bits, named, self.retired)

    def tag_bits(self, tags: Sequence[str | int]) -> int:
        """A set of tags, each by its word or its number, as bits.

        Raises:
            TypeError: `tags` is no list of words and numbers.
            ValueError: The catalogue has no tags, or not one of these.
        """
        if self.tags is None and not self.trie.has_tags:
            raise ValueError(
                "the catalogue has no tags; see Catalog.with_tags, onerec export --tags"
            )
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise TypeError(f"wanted a list of tags, got {tags!r}")
        bits = 0
        for tag in tags:
            if isinstance(tag, str):
                if tag not in self.tag_words:
                    has = ", ".join(self.tag_words) or "no words, numbers alone"
                    raise ValueError(f"the catalogue has no tag {tag!r}; it has {has}")
                tag = self.tag_words.index(tag)
            elif isinstance(tag, bool) or not isinstance(tag, Integral):
                raise TypeError(f"wanted words or numbers of tags, got {tag!r}")
            most = len(self.tag_words) or MAX_TAGS
            if not 0 <= tag < most:
                raise ValueError(f"wanted tags 0 to {most - 1}, got {tag}")
            bits |= 1 << int(tag)
        return bits

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        return (
            f"Catalog(items={len(self)}, leaves={self.trie.n_leaves}, levels={self.levels}, "
            f"codebook_size={self.codebook_size})"
        )

    def leaf_items(self, leaf: int) -> npt.NDArray[np.int64]:
        """Indices of the items that share a leaf, ascending.

        Raises:
            ValueError: No such leaf.
        """
        if not 0 <= leaf < self.trie.n_leaves:
            raise ValueError(f"leaf: wanted an id in [0, {self.trie.n_leaves}), got {leaf}")
        return self.leaf_item_indices[self.leaf_offsets[leaf] : self.leaf_offsets[leaf + 1]]

    def index_of(self, ids: ArrayLike) -> npt.NDArray[np.int64]:
        """Indices int64 [n] of item ids [n].

        Raises:
            ValueError: Ids that the catalogue lacks; the message lists the first ones.
        """
        wanted = _item_ids(ids, expected=self.item_ids.dtype)
        found = self.find(wanted)
        unknown = wanted[found < 0]
        if len(unknown):
            first = ", ".join(repr(item) for item in unknown[:5].tolist())
            raise ValueError(
                f"ids: {len(unknown)} of {len(wanted)} are not in the catalogue, e.g. {first}"
            )
        return found

    def find(self, ids: ArrayLike) -> npt.NDArray[np.int64]:
        """Indices int64 [n] of item ids [n]; -1 for an id that the catalogue lacks."""
        wanted = _item_ids(ids, expected=self.item_ids.dtype)
        if self.item_ids.dtype == object:
            return np.array([self._index.get(item, -1) for item in wanted], dtype=np.int64)
        found = np.full(len(wanted), -1, dtype=np.int64)
        if len(self._sorted):
            at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
            known = self._sorted[at] == wanted
            found[known] = self._order[at[known]]
        return found

    def collision_report(self) -> dict[str, float | int]:
        """How far items share semantic ids.

        Returns:
            items, leaves, colliding_items (items that share their id), collision_rate (their
            share), unique_share (the share of items that do not), largest_collision (most items of
            one id), and mean_items_per_leaf.
        """
        sizes = np.diff(self.leaf_offsets)
        colliding = int(sizes[sizes > 1].sum())
        items = len(self)
        return {
            "items": items,
            "leaves": self.trie.n_leaves,
            "colliding_items": colliding,
            "collision_rate": colliding / items if items else 0.0,
            "unique_share": 1.0 - colliding / items if items else 0.0,
            "largest_collision": int(sizes.max(initial=0)),
            "mean_items_per_leaf": items / self.trie.n_leaves if items else 0.0,
        }

    def save(self, path: str | Path) -> None:
        """Writes `catalog.parquet` and `trie.bin` into `path`.

        The columns are item_id, codes, leaf and, where there are any, tags and retired; the words
        of tags are a JSON list in the file's metadata, `onerec.tag_words`, and the quantizer is
        there too, `onerec.quantizer`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        codes = pa.ListArray.from_arrays(
            pa.array(np.arange(len(self) + 1, dtype=np.int32) * np.int32(self.levels)),
            pa.array(self.sids.reshape(-1)),
        )
        ids_type = pa.string() if self.item_ids.dtype == object else pa.int64()
        table = pa.table(
            {
                "item_id": pa.array(self.item_ids, type=ids_type),
                "codes": codes,
                "leaf": pa.array(self.leaf_of_item),
                **({} if self.tags is None else {"tags": pa.array(self.tags)}),
                **({} if self.retired is None else {"retired": pa.array(self.retired)}),
            }
        )
        metadata = {_WORDS: json.dumps(self.tag_words), _QUANTIZER: self.quantizer}
        table = table.replace_schema_metadata(
            {k: v for k, v in metadata.items() if v != "[]" and v}
        )
        self.trie.save(folder / "trie.bin")
        with atomic_write(folder / "catalog.parquet") as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Catalog:
        """Reads what `save` wrote and checks that both files agree.

        Raises:
            FileNotFoundError: A file is missing.
            DataError: A file is corrupt, has other columns, or does not agree with the other.
        """
        file = Path(path) / "catalog.parquet"
        for one in (Path(path) / "trie.bin", file):
            if not is_regular(one):
                raise DataError(f"{one}: wanted a regular file, got another kind")
        trie = SidTrie.load(Path(path) / "trie.bin")
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read as Parquet: {error}") from None
        columns: dict[str, tuple[pa.DataType, ...]] = {
            "item_id": (pa.int64(), pa.string()),
            "codes": (pa.list_(pa.int32()),),
            "leaf": (pa.int64(),),
        }
        if "tags" in table.column_names:
            columns["tags"] = (pa.int64(),)
        if "retired" in table.column_names:
            columns["retired"] = (pa.bool_(),)
        for name, types in columns.items():
            got = table.schema.field(name).type if name in table.column_names else "no such column"
            if got not in types:
                wanted = " or ".join(str(t) for t in types)
                raise DataError(f"{file}, column {name}: wanted {wanted}, got {got}")
            if table[name].null_count:
                row = table[name].is_null().index(pa.scalar(True)).as_py()
                raise DataError(f"{file}, column {name}, row {row}: wanted a value, got null")
        codes = table["codes"].combine_chunks()
        lengths = np.asarray(codes.value_lengths())
        wrong = np.flatnonzero(lengths != trie.levels)
        if len(wrong):
            raise DataError(
                f"{file}, column codes, row {wrong[0]}: wanted {trie.levels} codes as in trie.bin, "
                f"got {lengths[wrong[0]]}"
            )
        flat = codes.flatten()
        if flat.null_count:
            raise DataError(f"{file}, column codes: wanted codes, got nulls")
        sids = np.ascontiguousarray(flat.to_numpy().reshape(-1, trie.levels))
        ids = table["item_id"].to_numpy()
        try:
            _check_ids(ids)
        except ValueError as error:
            raise DataError(f"{file}, column item_id: {error}") from None
        wrong = np.flatnonzero(trie.lookup(sids) < 0)
        if len(wrong):
            raise DataError(
                f"{file}, column codes, row {wrong[0]}: wanted a semantic id of trie.bin, "
                f"got {sids[wrong[0]].tolist()}"
            )
        tags = table["tags"].to_numpy() if "tags" in columns else None
        if tags is not None and len(tags) and tags.min() < 0:
            raise DataError(
                f"{file}, column tags, row {tags.argmin()}: wanted bits 0 to 62, got {tags.min()}"
            )
        try:
            words = _tag_words(json.loads((table.schema.metadata or {}).get(_WORDS, b"[]")))
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}, metadata {_WORDS.decode()}: {error}") from None
        quantizer = (table.schema.metadata or {}).get(_QUANTIZER, b"").decode("ascii", "replace")
        retired = table["retired"].to_numpy() if "retired" in columns else None
        catalog = cls(ids, sids, trie, tags, words, quantizer, retired)
        wrong = np.flatnonzero(catalog.leaf_of_item != table["leaf"].to_numpy())
        if len(wrong):
            raise DataError(
                f"{file}, column leaf, row {wrong[0]}: trie.bin has leaf "
                f"{catalog.leaf_of_item[wrong[0]]}, got {table['leaf'][int(wrong[0])]}"
            )
        empty = np.flatnonzero(np.diff(catalog.leaf_offsets) == 0)
        if len(empty):
            raise DataError(f"{file}: no item for leaf {empty[0]} of trie.bin")
        return catalog


def _item_ids(ids: ArrayLike, expected: np.dtype[Any] | None = None) -> npt.NDArray[Any]:
    """Ids as int64 [n] or object [n] of str."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"item_ids: wanted 1 dimension, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int64 if expected is None else expected)
    # NumPy makes strings of all that a list mixes with one.
    given = ids if isinstance(ids, list | tuple) else array.tolist()
    if array.dtype.kind in "UO" and all(isinstance(item, str) for item in given):
        array = array.astype(object)
    elif array.dtype.kind in "iu":
        array = as_int_array("item_ids", array, np.int64, 1)
    else:
        got = "both" if array.dtype.kind == "U" else array.dtype
        raise TypeError(f"item_ids: wanted integers or strings, got {got}")
    if expected is not None and array.dtype != expected:
        wanted, got = (
            "strings" if kind.kind == "O" else "integers" for kind in (expected, array.dtype)
        )
        raise TypeError(f"ids: wanted {wanted} as in the catalogue, got {got}")
    return array


def _tags_of(item: object) -> list[Any]:
    """An item's tags: none, one, or a list of them."""
    if item is None:
        return []
    return list(item) if isinstance(item, list | tuple | np.ndarray) else [item]


def _tag_words(words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"words: wanted a list of words, got {words!r}")
    if len(words) > MAX_TAGS:
        raise ValueError(
            f"words: wanted at most {MAX_TAGS} tags, got {len(words):,} different ones; choose some"
        )
    if twice := [word for word in words if words.count(word) > 1]:
        raise ValueError(f"words: wanted each once, got {twice[0]!r} twice")
    return tuple(words)


def _check_ids(ids: npt.NDArray[Any]) -> None:
    if ids.dtype == object:  # C programs take an id to end at a zero
        for row, item in enumerate(ids.tolist()):
            if "\0" in item:
                raise ValueError(f"item_ids: wanted no zero characters, got {item!r} in row {row}")
    values, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(values) != len(ids):
        twice = np.flatnonzero(counts > 1)
        item = values[twice[:1]].tolist()[0]
        row = np.flatnonzero(ids == item)[1]
        raise ValueError(
            f"item_ids: wanted each once, got {item!r} in rows {first[twice[0]]} and {row}"
        )
