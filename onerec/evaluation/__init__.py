"""Evaluation: metrics with intervals, baselines, the harness and the report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onerec.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from onerec.evaluation.baselines import Popularity, Random, Ranker
    from onerec.evaluation.harness import evaluate
    from onerec.evaluation.report import render_report
    from onerec.evaluation.result import EvalResult, Measure

_HOMES = {
    "EvalResult": "result",
    "Measure": "result",
    "Popularity": "baselines",
    "Random": "baselines",
    "Ranker": "baselines",
    "evaluate": "harness",
    "render_report": "report",
}

__all__ = [
    "EvalResult",
    "EvaluationConfig",
    "Measure",
    "Popularity",
    "Random",
    "Ranker",
    "evaluate",
    "render_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
