"""Serving: decode loops and the `Recommender`."""

from onerec.inference.recommender import Candidates, Recommendation, Recommender

__all__ = ["Candidates", "Recommendation", "Recommender"]
