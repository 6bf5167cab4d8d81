"""The trie: what it holds, its file, and files that are not whole."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec import SidTrie
from onerec.errors import DataError


def random_sids(n: int, levels: int, codebook_size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, codebook_size, (n, levels), dtype=np.int32)


@pytest.mark.parametrize(
    ("n", "levels", "codebook_size"),
    [(0, 3, 8), (1, 1, 1), (33, 3, 4), (1000, 2, 256), (1000, 4, 257), (3000, 8, 65536)],
)
def test_holds_exactly_the_distinct_ids_in_order(n: int, levels: int, codebook_size: int) -> None:
    sids = random_sids(n, levels, codebook_size)
    trie = SidTrie.build(sids, codebook_size)
    distinct = np.unique(sids, axis=0) if n else sids
    assert trie.n_leaves == len(distinct)
    assert (trie.levels, trie.codebook_size) == (levels, codebook_size)
    np.testing.assert_array_equal(trie.leaf_sids(np.arange(len(distinct))), distinct)
    np.testing.assert_array_equal(trie.lookup(distinct), np.arange(len(distinct)))
    others = random_sids(500, levels, codebook_size, seed=1)
    known = {tuple(sid) for sid in distinct.tolist()}
    expected = [tuple(sid) in known for sid in others.tolist()]
    np.testing.assert_array_equal(trie.lookup(others) >= 0, expected)


def test_lookup_of_codes_out_of_range_is_unknown() -> None:
    trie = SidTrie.build([[0, 1], [1, 1]], 2)
    assert trie.lookup([[-1, 1], [0, 2], [1, 1]]).tolist() == [-1, -1, 1]


def test_order_and_repetition_of_the_input_do_not_change_the_bytes() -> None:
    sids = random_sids(5000, 3, 40)
    rng = np.random.default_rng(1)
    again = rng.permutation(np.concatenate([sids, sids[:700]]))
    assert torch.equal(SidTrie.build(sids, 40).data, SidTrie.build(again, 40).data)


def test_stats_count_nodes_edges_and_single_children() -> None:
    trie = SidTrie.build([[0, 0], [0, 3], [2, 1]], 4)
    stats = trie.stats()
    assert stats["leaves"] == 3
    assert stats["bytes"] == trie.nbytes == len(trie.data)
    assert stats["levels"] == [
        {"nodes": 1, "edges": 2, "mean_degree": 2.0, "max_degree": 2, "single_child_share": 0.0},
        {"nodes": 2, "edges": 3, "mean_degree": 1.5, "max_degree": 2, "single_child_share": 0.5},
    ]


def test_bytes_of_a_random_million() -> None:
    trie = SidTrie.build(random_sids(1_000_000, 3, 8192), 8192)
    assert trie.stats()["bytes_per_leaf"] <= 9


def test_save_and_load(tmp_path: Path) -> None:
    trie = SidTrie.build(random_sids(300, 3, 16), 16)
    trie.save(tmp_path / "trie.bin")
    loaded = SidTrie.load(tmp_path / "trie.bin")
    assert torch.equal(loaded.data, trie.data)
    assert (tmp_path / "trie.bin").read_bytes() == bytes(trie.data.numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["trie.bin"]
    assert torch.equal(pickle.loads(pickle.dumps(loaded)).data, trie.data)


def test_data_outlives_the_trie() -> None:
    data = SidTrie.build(random_sids(300, 3, 16), 16).data
    assert torch.equal(data, SidTrie.build(random_sids(300, 3, 16), 16).data)


@pytest.mark.parametrize(
    ("sids", "codebook_size", "message"),
    [
        ([[0, 4]], 4, "sids: wanted codes in .0, 4., got 4 in row 0, level 1"),
        ([[0, 0], [-1, 0]], 4, "got -1 in row 1, level 0"),
        ([0, 1], 4, "sids: wanted 2 dimension"),
        (np.zeros((1, 9), np.int32), 4, "levels: wanted 1..8, got 9"),
        (np.zeros((1, 0), np.int32), 4, "levels: wanted 1..8, got 0"),
        ([[0]], 0, "codebook_size: wanted 1..65536, got 0"),
        ([[0]], 65537, "codebook_size: wanted 1..65536, got 65537"),
        ([[2**40]], 4, "sids: wanted values that fit int32"),
    ],
)
def test_bad_input_is_refused(sids: object, codebook_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SidTrie.build(sids, codebook_size)


def test_wrong_types_and_ids_are_refused() -> None:
    with pytest.raises(TypeError, match="sids: wanted integers, got float64"):
        SidTrie.build([[0.5]], 4)
    trie = SidTrie.build([[0, 1]], 2)
    with pytest.raises(ValueError, match=r"sids: wanted \[n, 2\]"):
        trie.lookup([[0]])
    with pytest.raises(ValueError, match=r"leaves: wanted ids in \[0, 1\), got 1 at 0"):
        trie.leaf_sids([1])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SidTrie.load(tmp_path / "none")
    with pytest.raises(OSError, match="cannot write"):
        SidTrie.build([[0]], 1).save(tmp_path / "no" / "folder")


def test_a_failed_save_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "trie.bin"
    path.mkdir()
    with pytest.raises(OSError, match="cannot write"):
        SidTrie.build([[0]], 1).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["trie.bin"]


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"X", "does not start with ONERTRIE"),
        (8, struct.pack("<I", 2), "version: wanted 1, got 2"),
        (12, struct.pack(">I", 0x01020304), "byte order is not this machine's"),
        (16, struct.pack("<Q", 1), "header hash"),
        (24, struct.pack("<I", 4), "header hash"),
        (48, struct.pack("<Q", 1 << 60), "header hash"),
        (300, b"\xff", "content hash"),
    ],
)
def test_damage_is_named(tmp_path: Path, offset: int, patch: bytes, message: str) -> None:
    path = tmp_path / "trie.bin"
    SidTrie.build(random_sids(300, 3, 16), 16).save(path)
    data = bytearray(path.read_bytes())
    data[offset : offset + len(patch)] = patch
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        SidTrie.load(path)


def test_every_truncation_and_extension_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trie.bin"
    SidTrie.build(random_sids(40, 3, 5), 5).save(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            SidTrie.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="size in bytes"):
        SidTrie.load(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.getbasetemp() / "flipped.bin"
    SidTrie.build(random_sids(40, 3, 5), 5).save(path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        loaded = SidTrie.load(path)
    except DataError:
        return
    assert torch.equal(loaded.data, SidTrie.build(random_sids(40, 3, 5), 5).data)


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its specification, so that hostile files can carry right hashes."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
    mask = (1 << 64) - 1

    def rotate(x: int, r: int) -> int:
        return ((x << r) | (x >> (64 - r))) & mask

    def step(acc: int, word: int) -> int:
        return rotate((acc + word * p2) & mask, 31) * p1 & mask

    at = 0
    if len(data) >= 32:
        lanes = [(p1 + p2) & mask, p2, 0, -p1 & mask]
        while len(data) - at >= 32:
            for i, word in enumerate(struct.unpack_from("<4Q", data, at)):
                lanes[i] = step(lanes[i], word)
            at += 32
        h = sum(rotate(x, r) for x, r in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for x in lanes:
            h = ((h ^ step(0, x)) * p1 + p4) & mask
    else:
        h = p5
    h = (h + len(data)) & mask
    while len(data) - at >= 8:
        h = (rotate(h ^ step(0, struct.unpack_from("<Q", data, at)[0]), 27) * p1 + p4) & mask
        at += 8
    if len(data) - at >= 4:
        h = (rotate(h ^ (struct.unpack_from("<I", data, at)[0] * p1 & mask), 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ (byte * p5 & mask), 11) * p1 & mask
    h = (h ^ (h >> 33)) * p2 & mask
    h = (h ^ (h >> 29)) * p3 & mask
    return h ^ (h >> 32)


def test_hash_is_xxh64() -> None:
    assert xxh64(b"") == 0xEF46DB3751D8E999
    data = bytes(SidTrie.build(random_sids(40, 3, 5), 5).data.numpy())
    assert struct.unpack_from("<QQ", data, 240) == (xxh64(data[256:]), xxh64(data[:248]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_content_with_right_hashes_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.bin"
    hostile = bytearray(SidTrie.build(random_sids(40, 3, 5), 5).data.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        hostile[data.draw(st.integers(16, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    struct.pack_into("<Q", hostile, 240, xxh64(bytes(hostile[256:])))
    struct.pack_into("<Q", hostile, 248, xxh64(bytes(hostile[:248])))
    path.write_bytes(hostile)
    try:
        trie = SidTrie.load(path)
    except DataError:
        return
    # What is accepted is a trie: every leaf has its id and is found again.
    leaves = np.arange(trie.n_leaves)
    sids = trie.leaf_sids(leaves)
    assert (sids >= 0).all()
    assert (sids < trie.codebook_size).all()
    np.testing.assert_array_equal(trie.lookup(sids), leaves)


def test_bitmask_tells_what_may_follow() -> None:
    sids = random_sids(60, 3, 40)
    trie = SidTrie.build(sids, 40)
    for depth in range(3):
        prefixes = np.concatenate([sids[:20, :depth], np.full((1, depth), 39)])
        words = trie.bitmask(prefixes)
        assert words.shape == (21, 2)
        for prefix, row in zip(prefixes.tolist(), words.tolist(), strict=True):
            legal = {sid[depth] for sid in sids.tolist() if sid[:depth] == prefix}
            assert {c for c in range(40) if row[c // 32] >> (c % 32) & 1} == legal
    with pytest.raises(ValueError, match="prefixes: wanted fewer than 3 codes"):
        trie.bitmask(sids)
