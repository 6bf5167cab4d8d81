"""Changes of the catalogue: what each epoch holds, and what its readers see."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec import LiveTrie, SidTrie
from onerec.ops import BeamSearch

SIZE, LEVELS = 5, 3
SID = st.tuples(*[st.integers(0, SIZE - 1)] * LEVELS)
CHANGE = st.one_of(
    st.tuples(st.just("insert"), st.lists(st.tuples(SID, st.integers(0, 7)), max_size=8)),
    st.tuples(st.just("remove"), st.lists(SID, max_size=8)),
    st.tuples(st.sampled_from(["fold", "rollback"]), st.none()),
)


def array(sids: object) -> np.ndarray:
    return np.array(sids, dtype=np.int32).reshape(-1, LEVELS)


def held(trie: SidTrie) -> dict[tuple[int, ...], int]:
    """Live ids and their tags."""
    leaves = np.setdiff1d(np.arange(trie.n_leaves), trie.removed)
    sids = [tuple(sid) for sid in trie.leaf_sids(leaves).tolist()]
    tags = trie.tags[leaves].tolist() if trie.has_tags else [0] * len(leaves)
    return dict(zip(sids, tags, strict=True))


def masks_tell(trie: SidTrie, ids: set[tuple[int, ...]]) -> bool:
    """Whether the legal codes of every prefix are those of `ids`."""
    for depth in range(LEVELS):
        prefixes = sorted({sid[:depth] for sid in ids} | {(0,) * depth})
        words = trie.bitmask(
            np.array(prefixes, dtype=np.int64).reshape(len(prefixes), depth)
        ).numpy()
        for prefix, word in zip(prefixes, words[:, 0].tolist(), strict=True):
            wanted = sum(1 << c for c in {sid[depth] for sid in ids if sid[:depth] == prefix})
            if word != wanted:
                return False
    return True


@settings(max_examples=150, deadline=None)
@given(st.lists(SID, max_size=20), st.lists(CHANGE, max_size=8))
def test_any_changes_give_the_set_that_they_say(start: list, changes: list) -> None:
    live = LiveTrie(SidTrie.build(array(start), SIZE))
    now, before = dict.fromkeys(start, 0), None
    epochs = [(live.pin(), dict(now))]
    for number, (verb, given_sids) in enumerate(changes, start=1):
        if verb == "rollback" and before is None:
            with pytest.raises(RuntimeError, match="there was no change"):
                live.rollback()
            return
        was = dict(now)
        if verb == "insert":
            tags = [tag for _, tag in given_sids]
            live.insert(array([sid for sid, _ in given_sids]), tags)
            for sid, tag in given_sids:
                now[sid] = now.get(sid, 0) | tag
        elif verb == "remove":
            live.remove(array(given_sids))
            for sid in given_sids:
                now.pop(sid, None)
        elif verb == "rollback":
            live.rollback()
            now = dict(before)
        else:
            live.fold()
        before = was
        epoch = live.pin()
        assert epoch.id == number
        epochs.append((epoch, dict(now)))
    for epoch, ids in epochs:  # every one of them as it was, whatever came after
        assert held(epoch.trie) == ids
        assert epoch.trie.n_live == len(ids)
        assert masks_tell(epoch.trie, set(ids))
        everything = array(np.stack(np.meshgrid(*[range(SIZE)] * LEVELS, indexing="ij"), -1))
        known = [tuple(sid) in ids for sid in everything.tolist()]
        assert ((epoch.trie.lookup(everything) >= 0) == known).all()


def test_insertion_and_folding_give_the_bytes_of_a_new_trie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sids = rng.integers(0, 300, (3000, 4), dtype=np.int32)
    live = LiveTrie(SidTrie.build(sids[:2000], 300))
    live.insert(sids[1500:])
    assert torch.equal(live.pin().trie.data, SidTrie.build(sids, 300).data)
    live.remove(sids[:700])
    kept = live.pin().trie
    kept.save(tmp_path / "trie.bin")
    live.fold()
    left = np.setdiff1d(
        np.unique(sids, axis=0).view("i4,i4,i4,i4"),
        np.unique(sids[:700], axis=0).view("i4,i4,i4,i4"),
    )
    wanted = SidTrie.build(left.view("i4").reshape(-1, 4), 300)
    assert torch.equal(live.pin().trie.data, wanted.data)
    assert torch.equal(SidTrie.load(tmp_path / "trie.bin").data, wanted.data)
    again = pickle.loads(pickle.dumps(kept))
    assert (again.removed == kept.removed).all()
    assert again.n_live == wanted.n_leaves


def test_swap_wants_the_same_shape() -> None:
    live = LiveTrie(SidTrie.build([[0, 1]], 4))
    live.swap(SidTrie.build([[3, 3], [2, 2]], 4))
    assert live.pin().trie.n_live == 2
    with pytest.raises(ValueError, match="trie: wanted 2 levels of 4 codes, got 2 of 5"):
        live.swap(SidTrie.build([[0, 1]], 5))
    live.rollback()
    assert live.pin().trie.leaf_sids([0]).tolist() == [[0, 1]]


def test_bad_changes_change_nothing() -> None:
    live = LiveTrie(SidTrie.build([[0, 1]], 4))
    with pytest.raises(ValueError, match=r"sids: wanted codes in .0, 4., got 4 in row 0, level 1"):
        live.insert([[0, 4]])
    with pytest.raises(ValueError, match=r"sids: wanted \[n, 2\]"):
        live.remove([[0]])
    with pytest.raises(ValueError, match="tags: wanted one for each of 1 sids, got 2"):
        live.insert([[0, 2]], [1, 2])
    assert live.pin().id == 0
    with pytest.raises(ValueError, match="tags: wanted one for each of 1 leaves, got 2"):
        live.pin().trie.with_tags([1, 2])
    with pytest.raises(ValueError, match="tags: wanted bits below 63"):
        live.pin().trie.with_tags([-1])


def test_readers_find_only_what_their_epoch_holds() -> None:
    rng = np.random.default_rng(0)
    sids = np.unique(rng.integers(0, 16, (600, 3), dtype=np.int32), axis=0)
    live = LiveTrie(SidTrie.build(sids[::2], 16))
    stop, wrong = threading.Event(), []

    def read(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        search = BeamSearch(live.pin().trie, batch_size=1, beam_width=8, session_length=2)
        while not stop.is_set():
            trie = live.pin().trie
            search.reset(trie=trie)
            while not search.done:
                search.step(torch.randn(1, 8, 16, generator=generator))
            result = search.result()
            found = result.sids[0, : int(result.valid[0])].flatten(0, 1).numpy()
            if len(found) != 16 or (trie.lookup(found) < 0).any():
                wrong.append(found)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(60):
        some = rng.permutation(sids)[:40]
        live.insert(some[:20])
        live.remove(some[20:])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
