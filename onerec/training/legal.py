"""Which codes continue a prefix of a semantic id, for whole batches of ids at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


class LegalCodes:
    """The legal codes at every place of given semantic ids.

    Args:
        sids: int [N, L], the catalogue's semantic ids.
        codebook_size: K.
    """

    def __init__(self, sids: npt.NDArray[np.integer], codebook_size: int) -> None:
        self.codebook_size = codebook_size
        # Of each length, the distinct prefixes as numbers in base K, ascending.
        self._prefixes = []
        number = np.zeros(len(sids), dtype=np.int64)
        for level in range(sids.shape[1]):
            number = number * codebook_size + sids[:, level]
            self._prefixes.append(np.unique(number))

    def mask(self, sids: torch.Tensor) -> torch.Tensor:
        """Whether a code may stand at a place, given the id's codes before it.

        Args:
            sids: int64 [..., L] of any legal ids; -1 is padding, where every code is allowed.

        Returns:
            bool [..., L, K] on the device of `sids`.
        """
        flat = sids.reshape(-1, sids.shape[-1]).cpu().numpy()
        mask = np.zeros((*flat.shape, self.codebook_size), dtype=np.bool_)
        prefix = np.zeros(len(flat), dtype=np.int64)
        padding = flat[:, 0] < 0
        mask[padding] = True
        rows = np.flatnonzero(~padding)
        for level, numbers in enumerate(self._prefixes):
            first = prefix[rows] * self.codebook_size
            low = np.searchsorted(numbers, first)
            count = np.searchsorted(numbers, first + self.codebook_size) - low
            place = np.repeat(low - (np.cumsum(count) - count), count) + np.arange(count.sum())
            mask[np.repeat(rows, count), level, numbers[place] % self.codebook_size] = True
            prefix = prefix * self.codebook_size + flat[:, level]
        return torch.from_numpy(mask).to(sids.device).view(*sids.shape, self.codebook_size)
