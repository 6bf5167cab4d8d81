"""From item embeddings to semantic ids, and the catalogue of both.

What needs torch is imported on first use, so that the catalogue does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy
from onerec.tokenizer.catalog import Catalog

if TYPE_CHECKING:
    from onerec.tokenizer.balanced_kmeans import BalancedKMeans
    from onerec.tokenizer.residual_quantizer import ResidualQuantizer
    from onerec.tokenizer.rows import open_rows
    from onerec.tokenizer.rqvae import RQVAE

_HOMES = {
    "RQVAE": "onerec.tokenizer.rqvae",
    "BalancedKMeans": "onerec.tokenizer.balanced_kmeans",
    "ResidualQuantizer": "onerec.tokenizer.residual_quantizer",
    "open_rows": "onerec.tokenizer.rows",
}

__all__ = ["RQVAE", "BalancedKMeans", "Catalog", "ResidualQuantizer", "open_rows"]

__getattr__ = lazy(__name__, _HOMES)
