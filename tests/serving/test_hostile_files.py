"""Files that somebody made to harm: seeded changes, their hashes made anew, in C and in Python."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import onerec
from onerec import OneRec, OneRecConfig, Recommender
from onerec.errors import DataError, OneRecError
from onerec.inference import Mixture, exported
from onerec.inference.exported import export
from onerec.inference.native import NativeModel
from onerec.model.counting import CountRanker, popularity, transition
from onerec.tokenizer import Catalog

ITEMS, K = 60, 16
LIBRARY = next(Path(onerec.__file__).parent.glob("libonerec_core.so*"), None)
# Sizes of the headers, and where the hashes of the content and of the header before it lie.
HASHES = {
    "engine.bin": (256, 240),
    "trie.bin": (256, 240),
    "mixture.bin": (256, 240),
    "catalog.bin": (128, 64),
}
# Where catalog.bin names the others of its export.
LINKS = {"engine.bin": 80, "trie.bin": 88, "mixture.bin": 96}
MUTATIONS = int(os.environ.get("ONEREC_MUTATIONS", "150"))
MASK = 2**64 - 1
P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P4, P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def rotl(x: int, r: int) -> int:
    return ((x << r) | (x >> (64 - r))) & MASK


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its specification."""

    def turn(acc: int, lane: int) -> int:
        return rotl((acc + lane * P2) & MASK, 31) * P1 & MASK

    at, n = 0, len(data)
    if n >= 32:
        v = [(P1 + P2) & MASK, P2, 0, -P1 & MASK]
        whole = n // 32 * 32
        for lanes in struct.iter_unpack("<4Q", data[:whole]):
            v = [turn(acc, lane) for acc, lane in zip(v, lanes, strict=True)]
        at = whole
        h = sum(rotl(acc, r) for acc, r in zip(v, (1, 7, 12, 18), strict=True)) & MASK
        for acc in v:
            h = ((h ^ turn(0, acc)) * P1 + P4) & MASK
    else:
        h = P5
    h = (h + n) & MASK
    while at + 8 <= n:
        h = (rotl(h ^ turn(0, int.from_bytes(data[at : at + 8], "little")), 27) * P1 + P4) & MASK
        at += 8
    if at + 4 <= n:
        h ^= int.from_bytes(data[at : at + 4], "little") * P1 & MASK
        h = (rotl(h, 23) * P2 + P3) & MASK
        at += 4
    for byte in data[at:]:
        h = rotl(h ^ (byte * P5 & MASK), 11) * P1 & MASK
    h = (h ^ (h >> 33)) * P2 & MASK
    h = (h ^ (h >> 29)) * P3 & MASK
    return h ^ (h >> 32)


def sealed(name: str, data: bytes) -> bytes:
    """The file with right hashes and size, as an attacker would leave it."""
    header, at = HASHES[name]
    if len(data) < header:
        return data
    made = bytearray(data)
    made[16:24] = struct.pack("<Q", len(made))
    made[at : at + 8] = struct.pack("<Q", xxh64(bytes(made[header:])))
    made[at + 8 : at + 16] = struct.pack("<Q", xxh64(bytes(made[: at + 8])))
    return bytes(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny network that knows its items, with text ids, tags and a mixture."""
    path = tmp_path_factory.mktemp("hostile") / "export"
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_heads": 4, "d_ff": 16, "n_experts": 2, "expert_d_ff": 16}
    config = OneRecConfig.preset(
        "paper-tiny",
        codebook_size=K,
        session_length=2,
        n_items=ITEMS,
        item_loss=1.0,
        history_length=5,
        **sizes,
    )
    sids = np.random.default_rng(0).integers(0, K, (ITEMS, 3))
    catalog = Catalog.build([f"v{i:02}" for i in range(ITEMS)], sids, K)
    model = OneRec(config).eval()
    model.set_catalog(catalog.sids)
    walks = np.random.default_rng(1).integers(0, ITEMS, 300)
    seen = np.bincount(walks, minlength=ITEMS)
    parts = [transition(walks, np.arange(0, 301, 6), ITEMS), popularity(seen, neighbors=9)]
    mixture = Mixture(CountRanker(parts, seen), np.ones(4), np.ones(4))
    tagged = catalog.with_tags([1 + i % 3 for i in range(ITEMS)])
    export(model, tagged, path, mixture=mixture)
    return path


def linked(folder: Path) -> None:
    """Makes catalog.bin name the files that are beside it."""
    made = bytearray((folder / "catalog.bin").read_bytes())
    for name, at in LINKS.items():
        made[at : at + 8] = (folder / name).read_bytes()[248:256].ljust(8, b"x")
    (folder / "catalog.bin").write_bytes(sealed("catalog.bin", bytes(made)))


def test_the_hash_is_the_one_of_the_files(folder: Path) -> None:
    for name in HASHES:
        data = (folder / name).read_bytes()
        assert sealed(name, data) == data


PARTS = {"leaf_of_item": 0, "by_id": 1, "leaf_offsets": 2, "leaf_items": 3, "tags": 4, "offsets": 5}


def changed(folder: Path, to: Path, name: str, at: int, value: int, kind: str = "<q") -> Path:
    """A copy with one number changed and the hashes made anew."""
    shutil.copytree(folder, to)
    data = bytearray((folder / name).read_bytes())
    struct.pack_into(kind, data, at, value)
    (to / name).write_bytes(sealed(name, bytes(data)))
    return to


def part(folder: Path, name: str) -> int:
    """Where a part of catalog.bin lies."""
    leaves = struct.unpack_from("<Q", (folder / "catalog.bin").read_bytes(), 32)[0]
    sizes = [ITEMS, ITEMS, leaves + 1, ITEMS, ITEMS, ITEMS + 1]
    return 128 + 8 * sum(sizes[: PARTS[name]])


class RankOptions(ctypes.Structure):
    """onerec_rank_options."""

    _fields_ = (
        ("k", ctypes.c_int64),
        ("beam_width", ctypes.c_int64),
        ("dense_weight", ctypes.c_double),
        ("dense_top", ctypes.c_int64),
        ("exclude_history", ctypes.c_int32),
        ("scoring", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("num_threads", ctypes.c_int32),
        ("allow_tags", ctypes.c_uint64),
    )


class Library:
    """The C interface, by ctypes."""

    def __init__(self) -> None:
        self.c = c = ctypes.CDLL(str(LIBRARY))
        c.onerec_items.restype = c.onerec_find_text.restype = ctypes.c_int64
        c.onerec_session_length.restype = c.onerec_find_int.restype = ctypes.c_int64
        c.onerec_int_id.restype, c.onerec_text_id.restype = ctypes.c_int64, ctypes.c_char_p
        for name in ("onerec_find_int", "onerec_int_id", "onerec_text_id"):
            getattr(c, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
        c.onerec_find_text.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for name in ("onerec_items", "onerec_session_length", "onerec_ids_are_text"):
            getattr(c, name).argtypes = [ctypes.c_void_p]
        c.onerec_destroy.argtypes = [ctypes.c_void_p]
        c.onerec_default_rank_options.restype = RankOptions
        c.onerec_rank.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_size_t]
        c.onerec_rank.argtypes[2] = c.onerec_rank.argtypes[4] = ctypes.c_int64

    def open(self, folder: Path) -> tuple[int, str]:
        """Status and message; what loads is read through and let go."""
        made, error = ctypes.c_void_p(), ctypes.create_string_buffer(b"before", 500)
        status = self.c.onerec_create(str(folder).encode(), ctypes.byref(made), error, len(error))
        if status == 0:
            for item in range(-1, self.c.onerec_items(made) + 1):
                self.c.onerec_text_id(made, item)
                self.c.onerec_int_id(made, item)
            for name in (b"v07", b"", b"none"):
                assert -1 <= self.c.onerec_find_text(made, name) < self.c.onerec_items(made)
            self.rank(made)
            self.c.onerec_destroy(made)
        return status, error.value.decode(errors="replace")

    def rank(self, made: ctypes.c_void_p) -> None:
        """Ranks for a history; any status, and no item outside the catalogue."""
        options, found = self.c.onerec_default_rank_options(), ctypes.c_int64()
        history, items = (ctypes.c_int64 * 3)(0, 1, 0), (ctypes.c_int64 * options.k)()
        options.beam_width = 4
        arguments = (history, 3, None, 0, ctypes.byref(options), items, ctypes.byref(found))
        if self.c.onerec_rank(made, *arguments, None, 0) == 0:
            most = self.c.onerec_items(made)
            assert all(0 <= item < most for item in items[: found.value])


@pytest.fixture(scope="module")
def library() -> Library:
    assert LIBRARY is not None
    return Library()


def test_what_is_right_loads_and_leaves_no_message(library: Library, folder: Path) -> None:
    assert library.open(folder) == (0, "")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [-1, 2**40, 2**63 - 1, -(2**63), "one more"])
def test_every_number_of_a_catalogue_is_held_to_its_range(
    library: Library, folder: Path, tmp_path: Path, name: str, value: int | str
) -> None:
    at = part(folder, name) + 8 * 3
    before = struct.unpack_from("<q", (folder / "catalog.bin").read_bytes(), at)[0]
    if value == "one more":
        if name == "tags":
            return  # another tag is no fault
        number = before + 1
    elif name == "tags" and isinstance(value, int) and value > 0:
        return
    else:
        number = int(value)
    status, error = library.open(changed(folder, tmp_path / "bad", "catalog.bin", at, number))
    assert (status, ": wrong at " in error) == (2, True), error


@pytest.mark.parametrize(
    ("name", "at", "value", "kind", "words"),
    [
        ("catalog.bin", 24, 2**47, "<q", "do not fill"),  # items
        ("catalog.bin", 32, 2**47, "<q", "do not fill"),  # leaves
        ("catalog.bin", 40, 2, "<q", "do not fill"),  # text
        ("catalog.bin", 80, 1, "<q", "is not the file that was exported"),
        ("catalog.bin", 88, 1, "<q", "is not the file that was exported"),
        ("catalog.bin", 96, 1, "<q", "is not the file that was exported"),
        ("mixture.bin", 24, 61, "<q", "items: wanted 60 as in catalog.bin, got 61"),
        ("mixture.bin", 32, 2**39, "<q", "offsets: wrong"),  # lists
        ("mixture.bin", 40, 2**39, "<q", "do not fill"),
        ("mixture.bin", 256, 0x7FF0000000000000, "<q", "weights: wrong"),
        ("mixture.bin", 320, 2, "<q", "parts: wrong"),  # the list of the first part
        ("mixture.bin", 328, 2**39, "<q", "do not fill"),  # its ages
        ("mixture.bin", 328, -1, "<q", "parts: wrong"),
        ("mixture.bin", -4, 60, "<i", "neighbors: wrong"),
        ("mixture.bin", -4, -1, "<i", "neighbors: wrong"),
        ("engine.bin", 300, 0x7FC00000, "<i", "finite"),
        ("engine.bin", 300, 0x7F800000, "<i", "finite"),
    ],
)
def test_headers_links_and_weights_are_checked(
    library: Library, folder: Path, tmp_path: Path, name, at, value, kind, words
) -> None:
    bad = changed(folder, tmp_path / "bad", name, at, value, kind)
    if name != "catalog.bin":
        linked(bad)
    if name == "engine.bin":
        with pytest.raises(DataError, match=words):
            NativeModel.load(bad / "engine.bin", OneRec.read_config(bad / "config.json"))
    status, error = library.open(bad)
    assert (status, words in error) == (2, True), error


def test_absurd_sizes_of_an_engine_are_refused_without_a_walk(
    library: Library, folder: Path, tmp_path: Path
) -> None:
    data = bytearray((folder / "engine.bin").read_bytes())
    config = struct.unpack_from("<24i", data, 24)
    layers = next(i for i in range(24) if config[i : i + 2] == (2, 2))
    struct.pack_into("<2i", data, 24 + 4 * layers, 4096, 4096)
    struct.pack_into("<i", data, 24 + 4 * (layers + 3), 65536)  # experts
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "engine.bin").write_bytes(sealed("engine.bin", bytes(data)))
    # Two hundred such files take less than the one did that was walked through.
    for _ in range(200):
        with pytest.raises(DataError, match="do not fill the file"):
            NativeModel.load(bad / "engine.bin", OneRec.read_config(folder / "config.json"))


def test_no_open_waits_for_a_fifo(library: Library, folder: Path, tmp_path: Path) -> None:
    for name in HASHES:
        bad = shutil.copytree(folder, tmp_path / name)
        (bad / name).unlink()
        os.mkfifo(bad / name)
        status, error = library.open(bad)
        assert (status, "wanted a regular file" in error) == (2, True), error
    with pytest.raises(OSError, match="regular file"):
        NativeModel.load(tmp_path / "engine.bin/engine.bin", OneRecConfig.preset("paper-tiny"))


def test_null_handles_are_answered(library: Library) -> None:
    c = library.c
    assert c.onerec_items(None) == c.onerec_session_length(None) == -1
    assert c.onerec_ids_are_text(None) == -1
    assert c.onerec_find_int(None, 3) == c.onerec_find_text(None, b"a") == -1
    assert c.onerec_int_id(None, 3) == -(2**63)
    assert c.onerec_text_id(None, 3) is None


def test_ids_with_a_zero_are_refused_where_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"zero characters, got 'a\\x00b' in row 1"):
        Catalog.build(["a", "a\0b"], [[0, 0], [0, 1]], K)


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, numbers put in, cut off, or moved."""
    made = bytearray(data)
    numbers = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
    for _ in range(draw.choice([1, 1, 2, 3])):
        if len(made) < 16:
            break
        kind, at = draw.randrange(6), draw.randrange(len(made) - 8)
        if kind == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            struct.pack_into("<Q", made, at // 8 * 8, draw.choice(numbers))
        elif kind == 2:
            at = draw.randrange(min(128, len(made) - 4)) // 4 * 4
            struct.pack_into("<I", made, at, draw.choice(numbers) & 0xFFFFFFFF)
        elif kind == 3:
            del made[draw.randrange(len(made)) :]
        elif kind == 4:
            made += bytes(draw.choice([1, 8, 64]))
        else:
            size, other = draw.choice([1, 8, 64]), draw.randrange(len(made) - 8)
            piece = made[other : other + size]
            made[at : at + len(piece)] = piece
    return bytes(made)


def run_mutations(folder: Path, work: Path, seed: int, count: int) -> None:
    """Every file in turn, read by C and by Python. No exception but the documented ones."""
    draw, library = random.Random(seed), Library()
    names = [*HASHES, "config.json", "catalog.parquet"]
    for number in range(count):
        name = names[number % len(names)]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        data = mutated(draw, (folder / name).read_bytes())
        whole = name in HASHES and draw.random() < 0.8
        (work / name).write_bytes(sealed(name, data) if whole else data)
        if whole and name in LINKS:
            linked(work)
        assert library.open(work)[0] in (0, 2), (seed, number, name)
        loads: list[Callable[[], object]] = [
            lambda: Recommender.from_exported(work),
            lambda: Catalog.load(work),
            lambda: NativeModel.load(
                work / "engine.bin", OneRec.read_config(folder / "config.json")
            ),
        ]
        for load in loads:
            try:
                load()
            except (OneRecError, OSError, ValueError) as error:
                if "config.json" in str(error) or not isinstance(error, ValueError):
                    continue
                raise AssertionError((seed, number, name)) from error


def test_seeded_mutations_end_in_a_documented_error(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which a crash would end."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_hostile_files import run_mutations\n"
        "run_mutations(Path(sys.argv[2]), Path(sys.argv[3]), 7, int(sys.argv[4]))\n"
    )
    arguments = [str(Path(__file__).parent), str(folder), str(tmp_path / "w"), str(MUTATIONS)]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((folder / "config.json").read_text())[exported.LINEAGE]["export"]
