"""Item ids, semantic ids and leaves, and the files that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec import SidTrie
from onerec.errors import DataError
from onerec.tokenizer import Catalog

SIDS = [[1, 0], [0, 2], [1, 0], [0, 1], [1, 0]]


def catalog(strings: bool = False) -> Catalog:
    ids = ["e", "d", "c", "b", "a"] if strings else [50, 40, 30, 20, 10]
    return Catalog.build(ids, SIDS, 3)


@pytest.mark.parametrize("strings", [False, True], ids=["int", "str"])
def test_leaves_and_items(strings: bool) -> None:
    c = catalog(strings)
    assert c.leaf_of_item.tolist() == [2, 1, 2, 0, 2]
    assert [c.leaf_items(leaf).tolist() for leaf in range(3)] == [[3], [1], [0, 2, 4]]
    assert c.index_of(c.item_ids[[3, 0, 3]]).tolist() == [3, 0, 3]
    assert c.index_of([]).tolist() == []
    with pytest.raises(ValueError, match=r"leaf: wanted an id in \[0, 3\), got 3"):
        c.leaf_items(3)


def test_collision_report() -> None:
    assert catalog().collision_report() == {
        "items": 5,
        "leaves": 3,
        "colliding_items": 3,
        "collision_rate": 0.6,
        "unique_share": 0.4,
        "largest_collision": 3,
        "mean_items_per_leaf": 5 / 3,
    }


def test_unknown_ids_are_listed() -> None:
    with pytest.raises(ValueError, match=r"ids: 2 of 3 are not in the catalogue, e\.g\. 11, 99"):
        catalog().index_of([11, 10, 99])
    with pytest.raises(ValueError, match=r"e\.g\. 'x'"):
        catalog(strings=True).index_of(["a", "x"])
    with pytest.raises(TypeError, match="wanted strings as in the catalogue, got integers"):
        catalog(strings=True).index_of([1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"item_ids: wanted each once, got 7 in rows 0 and 2"):
        Catalog.build([7, 8, 7], [[0], [1], [2]], 3)
    with pytest.raises(ValueError, match="sids: wanted a row for each of 1 items, got 2"):
        Catalog.build([7], [[0], [1]], 3)
    with pytest.raises(TypeError, match="item_ids: wanted integers or strings, got float64"):
        Catalog.build([0.5], [[0]], 3)
    with pytest.raises(TypeError, match="item_ids: wanted integers or strings, got both"):
        Catalog.build([1, "b"], [[0], [1]], 3)
    with pytest.raises(ValueError, match="got 3 in row 0, level 0"):
        Catalog.build([7], [[3]], 3)


@pytest.mark.parametrize("strings", [False, True], ids=["int", "str"])
def test_save_and_load(tmp_path: Path, strings: bool) -> None:
    c = catalog(strings)
    c.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["catalog.parquet", "trie.bin"]
    loaded = Catalog.load(tmp_path)
    assert loaded.item_ids.dtype == c.item_ids.dtype
    for name in ("item_ids", "sids", "leaf_of_item", "leaf_offsets", "leaf_item_indices"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(c, name))
    table = pq.read_table(tmp_path / "catalog.parquet")
    assert table.column_names == ["item_id", "codes", "leaf"]
    assert table["codes"].to_pylist() == SIDS


def test_retired_items_are_known_and_marked(tmp_path: Path) -> None:
    c = catalog()
    one = c.retire([30]).with_tags(["a", "b", "a", None, "b"]).retire([10])
    assert c.retired is None
    one.save(tmp_path)
    loaded = Catalog.load(tmp_path)
    assert loaded.retired is not None
    assert loaded.retired.tolist() == [False, False, True, False, True]
    assert loaded.tag_words == ("a", "b")
    assert loaded.index_of([30, 10]).tolist() == [2, 4]
    assert loaded.fingerprint == one.fingerprint != c.fingerprint
    with pytest.raises(ValueError, match=r"ids: 1 of 1 are not in the catalogue, e\.g\. 7"):
        c.retire([7])


def test_words_become_tags_that_files_keep(tmp_path: Path) -> None:
    words = ["film", None, ["news", "film"], [], np.array(["sport"], dtype=object)]
    tagged = catalog().with_tags(words)
    assert tagged.tag_words == ("film", "news", "sport")
    assert tagged.tags is not None
    assert tagged.tags.tolist() == [1, 0, 3, 0, 4]
    assert tagged.trie.tags.tolist() == [0, 0, 7]  # a leaf has those of all its items
    tagged.save(tmp_path)
    loaded = Catalog.load(tmp_path)
    assert loaded.tag_words == tagged.tag_words
    np.testing.assert_array_equal(loaded.tags, tagged.tags)
    assert loaded.tag_bits(["sport", 0]) == loaded.tag_bits(("film", "sport", "film")) == 0b101
    assert loaded.tag_bits([]) == 0
    chosen = catalog().with_tags(words, ["sport", "film"])
    assert chosen.tags is not None
    assert chosen.tags.tolist() == [2, 0, 2, 0, 1]
    named = catalog().with_tags([1, 0, 2, 3, 0], ["a", "b"])
    assert (named.tag_bits(["b"]), named.tag_words) == (2, ("a", "b"))
    assert catalog().with_tags(np.array([1, 0, 2**62, 3, 0])).tag_bits([62]) == 2**62


def test_wrong_tags_are_told(tmp_path: Path) -> None:
    words = [[f"word {n}" for n in range(15 * i, 15 * i + 15)] for i in range(5)]
    with pytest.raises(ValueError, match="wanted at most 63 tags, got 75 different ones; choose"):
        catalog().with_tags(words)
    assert len(catalog().with_tags(words, ["word 7", "word 70"]).tag_words) == 2
    with pytest.raises(ValueError, match="wanted one for each of 5 items, got 1"):
        catalog().with_tags(["film"])
    with pytest.raises(ValueError, match="words: wanted each once, got 'a' twice"):
        catalog().with_tags(["a"] * 5, ["a", "b", "a"])
    with pytest.raises(ValueError, match="tags: wanted bits 0 to 1, got 4"):
        catalog().with_tags([1, 0, 4, 3, 0], ["a", "b"])
    with pytest.raises(ValueError, match="tags: wanted bits 0 to 62, got -1"):
        catalog().with_tags([1, 0, -1, 3, 0])
    with pytest.raises(TypeError, match="a word, a list of words, or None"):
        catalog().with_tags(["a", 1, None, "b", "c"])
    with pytest.raises(TypeError, match="words: wanted a list of words, got 'film'"):
        catalog().with_tags(["a"] * 5, "film")
    with pytest.raises(ValueError, match=r"the catalogue has no tags; see .* export --tags"):
        catalog().tag_bits([0])
    named = catalog().with_tags(["a", "b", "a", "b", None])
    for tags, kind, message in (
        (["c"], ValueError, "the catalogue has no tag 'c'; it has a, b"),
        ([2], ValueError, "wanted tags 0 to 1, got 2"),
        ([0.5], TypeError, "wanted words or numbers of tags, got 0.5"),
        ("a", TypeError, "wanted a list of tags, got 'a'"),
        (1, TypeError, "wanted a list of tags, got 1"),
    ):
        with pytest.raises(kind, match=message):
            named.tag_bits(tags)
    with pytest.raises(ValueError, match="it has no words, numbers alone"):
        catalog().with_tags([0] * 5).tag_bits(["a"])
    named.save(tmp_path)
    table = pq.read_table(tmp_path / "catalog.parquet")
    for value in ("[1]", "nothing", '["a", "a"]', '"film"'):
        changed = table.replace_schema_metadata({"onerec.tag_words": value})
        pq.write_table(changed, tmp_path / "catalog.parquet")
        with pytest.raises(DataError, match=r"catalog\.parquet, metadata onerec\.tag_words: "):
            Catalog.load(tmp_path)


def test_no_items(tmp_path: Path) -> None:
    empty = Catalog.build([], np.zeros((0, 2), np.int32), 3)
    empty.save(tmp_path)
    assert len(Catalog.load(tmp_path)) == 0
    assert empty.collision_report()["collision_rate"] == 0.0


def replace(path: Path, **columns: pa.Array | None) -> None:
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.drop_columns([name])
        if column is not None:
            table = table.append_column(name, column)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"leaf": None}, "column leaf: wanted int64, got no such column"),
        ({"leaf": pa.array([2, 1, 2, 0, 2], pa.int32())}, "column leaf: wanted int64, got int32"),
        ({"leaf": pa.array([2, 1, 2, 0, 1])}, "column leaf, row 4: trie.bin has leaf 2, got 1"),
        ({"leaf": pa.array([2, None, 2, 0, 2])}, "column leaf, row 1: wanted a value, got null"),
        (
            {"item_id": pa.array([50, 40, 30, 20, 50])},
            "column item_id: item_ids: wanted each once",
        ),
        (
            {"codes": pa.array([*SIDS[:4], [1]], pa.list_(pa.int32()))},
            "column codes, row 4: wanted 2 codes as in trie.bin, got 1",
        ),
        (
            {"codes": pa.array([*SIDS[:4], [2, 2]], pa.list_(pa.int32()))},
            "column codes, row 4: wanted a semantic id of trie.bin, got .2, 2.",
        ),
    ],
)
def test_a_file_that_does_not_agree(
    tmp_path: Path, columns: dict[str, pa.Array | None], message: str
) -> None:
    catalog().save(tmp_path)
    replace(tmp_path / "catalog.parquet", **columns)
    with pytest.raises(DataError, match=message):
        Catalog.load(tmp_path)


def test_a_trie_of_other_items(tmp_path: Path) -> None:
    catalog().save(tmp_path)
    SidTrie.build([*SIDS, [2, 2]], 3).save(tmp_path / "trie.bin")
    with pytest.raises(DataError, match=r"no item for leaf 3 of trie.bin"):
        Catalog.load(tmp_path)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    catalog().save(tmp_path)
    parquet = tmp_path / "catalog.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        Catalog.load(tmp_path)
    parquet.unlink()
    with pytest.raises(FileNotFoundError):
        Catalog.load(tmp_path)
