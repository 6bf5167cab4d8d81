"""The mixture of generator, dense head and counts: what it learns, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onerec.errors import DataError
from onerec.inference import Mixture, NextItems
from onerec.model.counting import CountRanker, popularity

COUNTS = CountRanker([popularity(np.arange(1, 41))], np.arange(1, 41))


def requests(weights: list[float], count: int = 3000) -> list[tuple[NextItems, np.ndarray]]:
    """Requests of twelve candidates, whose taken item is drawn by a softmax of known weights."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        items = np.sort(rng.choice(40, 12, replace=False))
        generator, dense, counts = rng.normal(size=(3, 12)).astype(np.float32)
        found = NextItems(items, np.ones(12, bool), generator, dense, counts[None])
        score = np.asarray(weights) @ found.features()
        p = np.exp(score - score.max())
        made.append((found, items[rng.choice(12, 1, p=p / p.sum())]))
    return made


def test_the_weights_that_made_the_choices_are_found() -> None:
    wanted = [1.0, 0.5, -0.7]
    other = [0.2, 1.0, 0.4]
    fitted = Mixture.fit(COUNTS, requests(wanted), requests(other))
    np.testing.assert_allclose(fitted.masked, wanted, atol=0.08)
    np.testing.assert_allclose(fitted.unmasked, other, atol=0.08)
    found = requests(wanted, 1)[0][0]
    for masked, weights in ((True, fitted.masked), (False, fitted.unmasked)):
        score = weights @ found.features()
        items, scores = fitted.best(found, 5, exclude_history=masked)
        np.testing.assert_array_equal(items, found.items[np.argsort(-score)[:5]])
        np.testing.assert_array_equal(scores, np.sort(score)[::-1][:5])


def test_requests_without_a_hit_teach_nothing() -> None:
    some = requests([1.0, 0.0, 0.0], 200)
    lost = [(found, np.array([99])) for found, _ in requests([0.0, 0.0, 5.0], 50)]
    fitted = Mixture.fit(COUNTS, some, some + lost)
    np.testing.assert_array_equal(fitted.masked, fitted.unmasked)
    np.testing.assert_array_equal(Mixture.fit(COUNTS, lost, some).masked, [1, 0, 0])


def test_a_constant_feature_gets_no_weight() -> None:
    some = requests([1.0, 0.5, 0.0], 200)
    flat = [
        (NextItems(f.items, f.beamed, f.generator, f.dense, np.ones_like(f.counts)), taken)
        for f, taken in some
    ]
    assert abs(Mixture.fit(COUNTS, flat, []).masked[2]) < 1e-6


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    mixture = Mixture(COUNTS, np.array([1.0, 0.5, 0.25]), np.array([1.0, 0.0, 2.0]))
    mixture.save(tmp_path)
    loaded = Mixture.load(tmp_path)
    np.testing.assert_array_equal(loaded.masked, mixture.masked)
    np.testing.assert_array_equal(loaded.unmasked, mixture.unmasked)
    (tmp_path / "mixture.json").write_text('{"format": 2, "masked": [1, 2], "unmasked": [1, 2]}')
    with pytest.raises(DataError, match="damaged"):
        Mixture.load(tmp_path)
    (tmp_path / "mixture.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        Mixture.load(tmp_path)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, np.nan, 0.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    right = np.ones(3)
    with pytest.raises(ValueError, match="unmasked: wanted"):
        Mixture(COUNTS, right, np.array(weights))
