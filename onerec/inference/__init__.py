"""Serving: decode loops and the `Recommender`."""

from onerec.inference.recommender import Candidates, NextItems, Recommendation, Recommender

__all__ = ["Candidates", "NextItems", "Recommendation", "Recommender"]
