"""The legal codes of whole batches against a search of the catalogue."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onerec.model.trie_mask import TrieMask


@pytest.mark.parametrize("size", [5, 11, 16])
def test_legal_codes_are_those_of_the_catalogue(size: int) -> None:
    sids = np.random.default_rng(0).integers(0, size, (60, 3))
    asked = np.concatenate([sids[::4], np.full((1, 3), -1)])
    trie = TrieMask(torch.from_numpy(sids), size)
    mask = trie.mask(torch.from_numpy(asked)[None])[0].numpy()
    for row, sid in enumerate(asked[:-1]):
        for level in range(3):
            same = (sids[:, :level] == sid[:level]).all(axis=1)
            assert set(np.flatnonzero(mask[row, level])) == set(sids[same, level])
    assert mask[-1].all(), "padding"
    for level in range(3):
        torch.testing.assert_close(
            trie.items(torch.arange(0, 60, 4), level), torch.from_numpy(mask[:-1, level])
        )
