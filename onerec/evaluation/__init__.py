"""Evaluation: metrics with intervals, baselines, and the harness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy
from onerec.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from onerec.evaluation.baselines import Popularity, Random, Ranker
    from onerec.evaluation.counting import CountBaselines, fit_counts
    from onerec.evaluation.harness import evaluate
    from onerec.evaluation.result import EvalResult, Measure

_HOMES = {
    "CountBaselines": "onerec.evaluation.counting",
    "EvalResult": "onerec.evaluation.result",
    "Measure": "onerec.evaluation.result",
    "Popularity": "onerec.evaluation.baselines",
    "Random": "onerec.evaluation.baselines",
    "Ranker": "onerec.evaluation.baselines",
    "evaluate": "onerec.evaluation.harness",
    "fit_counts": "onerec.evaluation.counting",
}

__all__ = [
    "CountBaselines",
    "EvalResult",
    "EvaluationConfig",
    "Measure",
    "Popularity",
    "Random",
    "Ranker",
    "evaluate",
    "fit_counts",
]

__getattr__ = lazy(__name__, _HOMES)
