"""From item embeddings to semantic ids, and the catalogue of both."""

from onerec.tokenizer.catalog import Catalog

__all__ = ["Catalog"]
