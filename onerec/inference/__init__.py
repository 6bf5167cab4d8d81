"""Serving: decode loops and the `Recommender`."""

from onerec.inference.mixture import Mixture
from onerec.inference.recommender import Recommender
from onerec.inference.results import Candidates, NextItems, Recommendation

__all__ = ["Candidates", "Mixture", "NextItems", "Recommendation", "Recommender"]
