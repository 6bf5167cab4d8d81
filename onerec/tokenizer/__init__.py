"""From item embeddings to semantic ids, and the catalogue of both."""

from onerec.tokenizer.balanced_kmeans import BalancedKMeans
from onerec.tokenizer.catalog import Catalog
from onerec.tokenizer.residual_quantizer import ResidualQuantizer

__all__ = ["BalancedKMeans", "Catalog", "ResidualQuantizer"]
