"""Ragged rows as a padded matrix, beside a loop over the rows."""

from __future__ import annotations

import numpy as np
import pytest

from onerec.ragged import padded


@pytest.mark.parametrize("width", [0, 1, 5, 9])
def test_rows_are_those_of_a_loop(width: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 60).astype(np.int32)
    lengths = rng.integers(0, 8, 33)
    begin = rng.integers(0, 60 - 8, 33)
    expected = np.full((33, width), -1, dtype=np.int32)
    for row, (at, length) in enumerate(zip(begin, lengths, strict=True)):
        kept = values[at : at + min(length, width)]
        expected[row, : len(kept)] = kept
    found = padded(values, begin, lengths, width)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_nothing_gives_padding_only() -> None:
    none = np.zeros(2, dtype=np.int64)
    found = padded(np.empty(0, dtype=np.int64), none, none, 3)
    np.testing.assert_array_equal(found, np.full((2, 3), -1))
