"""From item embeddings to semantic ids, and the catalogue of both."""

from onerec.tokenizer.balanced_kmeans import BalancedKMeans
from onerec.tokenizer.catalog import Catalog
from onerec.tokenizer.residual_quantizer import ResidualQuantizer
from onerec.tokenizer.rows import open_rows
from onerec.tokenizer.rqvae import RQVAE

__all__ = ["RQVAE", "BalancedKMeans", "Catalog", "ResidualQuantizer", "open_rows"]
