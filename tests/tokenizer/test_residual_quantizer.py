"""Residual semantic ids: balance, distinctness, decoding, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from onerec.tokenizer import ResidualQuantizer
from onerec.tokenizer.residual_quantizer import describe_ids


def items(n: int = 700, d: int = 12, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    means = generator.standard_normal((9, d))
    x = means[generator.integers(0, 9, n)] + 0.3 * generator.standard_normal((n, d))
    return x.astype(np.float32)


def fitted(x: NDArray[np.float32], levels: int, size: int, **arguments) -> ResidualQuantizer:
    return ResidualQuantizer(
        levels, size, max_iter=3, random_state=0, num_threads=1, **arguments
    ).fit(x)


def test_levels_are_balanced_and_report_is_true() -> None:
    x = items()
    quantizer = fitted(x, 3, 16)
    assert quantizer.sids_.shape == (700, 3)
    assert quantizer.sids_.dtype == np.int32
    for codes in quantizer.sids_.T:
        assert sorted(np.bincount(codes, minlength=16)) == [43] * 4 + [44] * 12
    assert max(quantizer.gaps_) <= 1e-6
    report = quantizer.report_
    error = x - quantizer.decode(quantizer.sids_)
    assert report["mse"] == pytest.approx((error.astype(np.float64) ** 2).sum(1).mean(), rel=1e-5)
    assert report["mse_per_level"] == sorted(report["mse_per_level"], reverse=True)
    holders = np.unique(quantizer.sids_, axis=0, return_counts=True)[1]
    assert report["largest_collision"] == holders.max()
    assert report["collision_rate"] == pytest.approx(1 - len(holders) / 700)
    assert report["unique_share"] == pytest.approx((holders == 1).sum() / 700)
    assert report["sizes"] == [[43, 44]] * 3
    assert report["utilisation"] == [1.0] * 3


@pytest.mark.parametrize(
    ("x", "levels", "size"),
    [
        (items(700), 3, 16),
        (items(512), 3, 8),  # every id is taken
        (np.ones((60, 3), np.float32), 2, 8),  # one vector for all
        (np.repeat(items(40), 5, axis=0), 2, 16),
        (items(9), 1, 9),
        (items(64), 6, 2),
    ],
    ids=["roomy", "full", "all equal", "five of each", "one level", "six bits"],
)
def test_distinct_ids_are_unique(x: NDArray[np.float32], levels: int, size: int) -> None:
    quantizer = fitted(x, levels, size, distinct="distinct")
    assert len(np.unique(quantizer.sids_, axis=0)) == len(x)
    assert quantizer.report_["collision_rate"] == 0
    assert quantizer.report_["unique_share"] == 1


def test_distinct_needs_room() -> None:
    with pytest.raises(ValueError, match=r"wanted at most codebook_size \*\* levels = 64 rows"):
        fitted(items(65), 3, 4, distinct="distinct")


def test_cap_leaves_room_for_distinct_ids_in_every_prefix() -> None:
    x = np.concatenate([np.repeat(items(1), 30, axis=0), items(30)])
    free = fitted(x, 3, 4).sids_
    assert np.unique(free[:, :2], axis=0, return_counts=True)[1].max() > 4
    capped = fitted(x, 3, 4, distinct="cap").sids_
    assert np.unique(capped[:, :2], axis=0, return_counts=True)[1].max() <= 4
    assert np.unique(capped[:, 0], return_counts=True)[1].max() <= 16


def test_rank_level_numbers_the_items_of_an_id() -> None:
    x = np.repeat(items(50), 4, axis=0)
    plain = fitted(x, 2, 16)
    quantizer = fitted(x, 2, 16, distinct="rank")
    assert np.array_equal(quantizer.sids_[:, :2], plain.sids_)
    assert len(np.unique(quantizer.sids_, axis=0)) == len(x)
    seen: dict[tuple[int, int], int] = {}
    for first, second, rank in quantizer.sids_.tolist():
        assert rank == seen.get((first, second), 0)
        seen[first, second] = rank + 1
    assert np.array_equal(quantizer.decode(quantizer.sids_), plain.decode(plain.sids_))
    with pytest.raises(ValueError, match="wanted at most codebook_size = 4 items on an id"):
        fitted(np.ones((40, 2), np.float32), 1, 4, distinct="rank")


def test_encode_gives_training_items_their_codes() -> None:
    x = items(1500)
    quantizer = fitted(x, 2, 16)
    assert (quantizer.encode(x) == quantizer.sids_).mean() >= 0.995
    assert quantizer.encode(items(31, seed=5)).shape == (31, 2)
    assert quantizer.encode(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("distinct", ["none", "cap", "distinct", "rank"])
@pytest.mark.parametrize("slack", [1.0, 1.3])
def test_added_items_hold_the_caps_and_move_nobody(tmp_path: Path, distinct, slack: float) -> None:
    x = np.concatenate([items(200), np.repeat(items(3), 5, axis=0)])  # equal rows among them
    quantizer = fitted(x, 3, 16, distinct=distinct)
    before = quantizer.sids_.copy()
    quantizer.save_pretrained(tmp_path)
    for start in (0, 90):
        new = np.concatenate([items(80, seed=3 + start), x[:10]])
        added = quantizer.add(new, slack=slack)
        assert np.array_equal(quantizer.sids_[-90:], added)
        cap = np.ceil(slack * len(quantizer.sids_) / 16)
        for level in range(3 - (distinct == "distinct")):
            held = np.bincount(quantizer.sids_[:, level], minlength=16)
            old = np.bincount(quantizer.sids_[:-90, level], minlength=16)
            if distinct != "distinct" or slack > 1:  # there caps leave some prefixes no free id
                assert (held <= np.maximum(cap, old)).all()
    assert np.array_equal(quantizer.sids_[: len(x)], before)
    if distinct in ("distinct", "rank"):
        assert len(np.unique(quantizer.sids_, axis=0)) == len(x) + 180
    again = ResidualQuantizer.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="wanted sids, the ids in use"):
        again.add(new)
    if distinct != "distinct":  # without need nothing differs from encode
        added = again.add(new[:80], slack=9, sids=before)
        assert np.array_equal(added[:, :3], again.encode(new[:80])[:, :3])
    with pytest.raises(ValueError, match=r"slack: wanted at least 1, got 0\.5"):
        quantizer.add(new, slack=0.5)


def test_every_id_can_be_given_away() -> None:
    quantizer = fitted(items(20), 2, 8, distinct="distinct")
    quantizer.add(np.ones((44, 12), np.float32), slack=1.0)
    assert len(np.unique(quantizer.sids_, axis=0)) == 64
    with pytest.raises(ValueError, match="wanted at most 0 rows, the ids that are left, got 1"):
        quantizer.add(items(1))


def test_new_items_are_nearly_balanced() -> None:
    x, new = items(4000, seed=1), items(4000, seed=1)[::-1] + np.float32(0.01)
    quantizer = fitted(x, 1, 16)
    sizes = np.bincount(quantizer.encode(new)[:, 0], minlength=16)
    nearest = ((new[:, None] - quantizer.codebooks_[0]) ** 2).sum(2).argmin(1)
    assert sizes.std() < 0.3 * np.bincount(nearest, minlength=16).std()


@pytest.mark.parametrize("distinct", ["none", "rank"])
def test_saved_and_loaded(tmp_path: Path, distinct) -> None:
    quantizer = fitted(items(), 2, 32, distinct=distinct)
    quantizer.save_pretrained(tmp_path / "quantizer")
    again = ResidualQuantizer.from_pretrained(tmp_path / "quantizer")
    new = items(100, seed=4)
    assert np.array_equal(again.encode(new), quantizer.encode(new))
    assert np.array_equal(again.decode(quantizer.sids_), quantizer.decode(quantizer.sids_))
    assert again.report_ == quantizer.report_
    assert again.distinct == distinct


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    quantizer = fitted(items(), 2, 8)
    quantizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "levels": 3}))
    with pytest.raises(ValueError, match=r"codebooks: wanted float32 \[3, 8, 12\]"):
        ResidualQuantizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="wanted JSON"):
        ResidualQuantizer.from_pretrained(tmp_path)
    quantizer.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ResidualQuantizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        ResidualQuantizer.from_pretrained(tmp_path / "nowhere")


def test_mistakes_are_named() -> None:
    quantizer = fitted(items(), 2, 8)
    with pytest.raises(ValueError, match="distinct: wanted"):
        ResidualQuantizer(2, 8, distinct="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"levels: wanted at least 1"):
        ResidualQuantizer(0, 8)
    with pytest.raises(ValueError, match="wanted at least n_clusters = 8 rows, got 5"):
        fitted(items(5), 2, 8)
    with pytest.raises(ValueError, match="X: wanted 12 columns, got 3"):
        quantizer.encode(items(4, 3))
    with pytest.raises(ValueError, match="got 8 in row 1, level 0"):
        quantizer.decode([[0, 1], [8, 2]])
    with pytest.raises(ValueError, match=r"wanted shape \[n, 2\], got \[1, 3\]"):
        quantizer.decode([[0, 1, 2]])
    with pytest.raises(TypeError, match="wanted integers"):
        quantizer.decode([[0.5, 1.0]])
    with pytest.raises(RuntimeError, match="call fit or from_pretrained first"):
        ResidualQuantizer(2, 8).encode(items())


def test_describe_ids_counts_by_hand() -> None:
    sids = np.array([[0, 1], [0, 1], [1, 0], [1, 1]], np.int32)
    report = describe_ids(sids, 4)
    assert report["utilisation"] == [0.5, 0.5]
    assert report["sizes"] == [[0, 2], [0, 3]]
    assert report["entropy"][0] == pytest.approx(1)
    assert (report["unique_share"], report["collision_rate"]) == (0.5, 0.25)
    assert report["largest_collision"] == 2


@pytest.mark.parametrize("code", [-1, 16, 2**40])
def test_add_refuses_codes_that_the_quantizer_lacks(code: int) -> None:
    quantizer = fitted(items(200), 3, 16)
    used = quantizer.sids_.astype(np.int64)
    used[7, 1] = code
    with pytest.raises(ValueError, match=rf"sids: wanted codes in \[0, 16\), got {code} in row 7"):
        quantizer.add(items(5, seed=1), sids=used)


@pytest.mark.parametrize(
    "changed",
    [{"dimension": None}, {"levels": 3.0}, {"method": []}, {"max_iter": True}, {"report": 1}],
    ids=str,
)
def test_a_broken_config_is_told_with_its_path_and_field(tmp_path: Path, changed) -> None:
    fitted(items(200), 3, 16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=rf"config\.json: {next(iter(changed))}: wanted"):
        ResidualQuantizer.from_pretrained(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json: wanted JSON"):
        ResidualQuantizer.from_pretrained(tmp_path)


def test_values_that_are_not_finite_are_no_quantizer(tmp_path: Path) -> None:
    quantizer = fitted(items(200), 3, 16)
    quantizer.prices_[1, 3] = np.nan
    quantizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prices: wanted finite values"):
        ResidualQuantizer.from_pretrained(tmp_path)


def test_the_fingerprint_is_of_the_codebooks(tmp_path: Path) -> None:
    one, same, other = (fitted(items(200, seed=s), 3, 16) for s in (0, 0, 1))
    one.save_pretrained(tmp_path)
    loaded = ResidualQuantizer.from_pretrained(tmp_path).fingerprint
    assert one.fingerprint == same.fingerprint == loaded
    assert len({one.fingerprint, other.fingerprint}) == 2
