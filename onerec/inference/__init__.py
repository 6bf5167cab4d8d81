"""Serving: decode loops and the `Recommender`."""

from onerec.inference.recommender import Recommendation, Recommender

__all__ = ["Recommendation", "Recommender"]
