"""Training: batches of semantic ids, the pretraining loop, checkpoints and metrics.

Names are imported on first use, so that the settings alone do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onerec.training.batches import Batch, OrderedBatches, SessionBatches
    from onerec.training.config import TrainConfig
    from onerec.training.loop import TrainingInterrupted, TrainResult, pretrain
    from onerec.training.metrics import read_metrics
    from onerec.training.window import TrainingDiverged

_HOMES = {
    "Batch": "batches",
    "OrderedBatches": "batches",
    "SessionBatches": "batches",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainingDiverged": "window",
    "TrainingInterrupted": "loop",
    "pretrain": "loop",
    "read_metrics": "metrics",
}

__all__ = [
    "Batch",
    "OrderedBatches",
    "SessionBatches",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "pretrain",
    "read_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
