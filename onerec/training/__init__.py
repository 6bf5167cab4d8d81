"""Training: batches of semantic ids, the pretraining loop, checkpoints and metrics.

Names are imported on first use, so that the settings alone do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onerec.training.alignment import AlignmentResult, align
    from onerec.training.alignment_config import AlignmentConfig
    from onerec.training.batches import Batch, OrderedBatches, SessionBatches
    from onerec.training.config import TrainConfig
    from onerec.training.loop import TrainingInterrupted, TrainResult, pretrain
    from onerec.training.metrics import read_metrics
    from onerec.training.reward import RewardResult, train_reward
    from onerec.training.reward_config import RewardConfig
    from onerec.training.window import TrainingDiverged

_HOMES = {
    "AlignmentConfig": "alignment_config",
    "AlignmentResult": "alignment",
    "Batch": "batches",
    "OrderedBatches": "batches",
    "SessionBatches": "batches",
    "RewardConfig": "reward_config",
    "RewardResult": "reward",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainingDiverged": "window",
    "TrainingInterrupted": "loop",
    "align": "alignment",
    "pretrain": "loop",
    "read_metrics": "metrics",
    "train_reward": "reward",
}

__all__ = [
    "AlignmentConfig",
    "AlignmentResult",
    "Batch",
    "OrderedBatches",
    "RewardConfig",
    "RewardResult",
    "SessionBatches",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "align",
    "pretrain",
    "read_metrics",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
