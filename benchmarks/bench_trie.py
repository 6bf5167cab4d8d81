"""The trie itself: building, loading, changing, looking up; bytes of an item."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onerec import LiveTrie, SidTrie

SHAPES = {"wide": (3, 8192), "narrow": (4, 256)}


@functools.cache
def random_sids(shape: str, items: int) -> np.ndarray:
    levels, codes = SHAPES[shape]
    return np.random.default_rng(0).integers(0, codes, (items, levels), dtype=np.int32)


@functools.cache
def sorted_sids(shape: str, items: int) -> np.ndarray:
    levels, codes = SHAPES[shape]
    weights = codes ** np.arange(levels - 1, -1, -1)
    keys = np.unique(random_sids(shape, items) @ weights)
    return (keys[:, None] // weights % codes).astype(np.int32)


def dictionary(sids: np.ndarray) -> dict[int, Any]:
    """Nested dictionaries, as engines without a native trie have them."""
    root: dict[int, Any] = {}
    for sid in sids.tolist():
        node = root
        for code in sid:
            node = node.setdefault(code, {})
    return root


def leaves(trie: Any) -> int:
    if isinstance(trie, SidTrie):
        return trie.n_leaves
    return sum(map(leaves, trie.values())) if trie else 1


def same_leaves(trie: Any, expected: int) -> None:
    assert leaves(trie) == expected


@pytest.mark.parametrize("order", ["random", "sorted"])
@pytest.mark.parametrize("items", [100_000, 1_000_000, 10_000_000], ids=["100k", "1M", "10M"])
@pytest.mark.parametrize("shape", SHAPES)
def test_build(compare: Any, shape: str, items: int, order: str) -> None:
    sids = (random_sids if order == "random" else sorted_sids)(shape, items)
    codes = SHAPES[shape][1]
    trie = SidTrie.build(sids, codes)
    calls: dict[str, Callable[[], Any]] = {"onerec": lambda: SidTrie.build(sids, codes)}
    if items == 100_000 and order == "random":
        calls["dictionary"] = lambda: dictionary(sids)
    stats = trie.stats()
    compare(
        calls,
        check=same_leaves,
        expected=trie.n_leaves,
        work={"Mitems/s": len(sids) / 1e6},
        facts={
            "bytes an item": round(stats["bytes_per_leaf"], 2),
            "last nodes with one child": f"{stats['levels'][-1]['single_child_share']:.0%}",
        },
        seconds=0.5 if items < 10_000_000 else 1.0,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_load(compare: Any, shape: str, tmp_path: Path) -> None:
    """Maps the file, checks both hashes, every pointer and every token."""
    trie = SidTrie.build(random_sids(shape, 1_000_000), SHAPES[shape][1])
    trie.save(tmp_path / "trie.bin")
    compare(
        {"onerec": lambda: SidTrie.load(tmp_path / "trie.bin")},
        check=same_leaves,
        expected=trie.n_leaves,
        work={"GB/s": trie.nbytes / 1e9},
        seconds=0.3,
    )


@pytest.mark.parametrize("change", ["remove", "insert", "swap"])
@pytest.mark.parametrize("items", [1_000_000, 10_000_000], ids=["1M", "10M"])
def test_change(compare: Any, items: int, change: str) -> None:
    """A hundred ids removed or a thousand inserted, until readers see it."""
    shape, codes = "wide", SHAPES["wide"][1]
    sids = random_sids(shape, items)
    first = SidTrie.build(sids, codes)
    rng = np.random.default_rng(1)
    gone = rng.choice(sids, 100, axis=0)
    new = rng.integers(0, codes, (1000, 3), dtype=np.int32)
    live = LiveTrie(first)

    class Change:
        def prepare(self) -> None:
            live.swap(first)

        def __call__(self) -> SidTrie:
            if change == "remove":
                live.remove(gone)
            elif change == "insert":
                live.insert(new)
            else:
                live.swap(first)
            return live.pin().trie

    def changed(trie: SidTrie, _: object) -> None:
        assert change != "remove" or (trie.lookup(gone) == -1).all()
        assert change != "insert" or (trie.lookup(new) >= 0).all()

    compare({"onerec": Change()}, check=changed, expected=(), seconds=0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_lookup(compare: Any, shape: str) -> None:
    trie = SidTrie.build(random_sids(shape, 1_000_000), SHAPES[shape][1])
    sids = trie.leaf_sids(np.random.default_rng(0).integers(0, trie.n_leaves, 100_000))
    keys = {
        tuple(sid): leaf for leaf, sid in enumerate(trie.leaf_sids(range(trie.n_leaves)).tolist())
    }

    def from_dictionary() -> np.ndarray:
        return np.array([keys[tuple(sid)] for sid in sids.tolist()])

    compare(
        {"onerec": lambda: trie.lookup(sids, num_threads=1), "dictionary": from_dictionary},
        check=np.testing.assert_array_equal,
        work={"Mids/s": len(sids) / 1e6},
        seconds=0.5,
    )
