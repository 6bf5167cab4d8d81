"""Training: batches of semantic ids, the pretraining loop, checkpoints and metrics.

Names are imported on first use, so that the settings alone do not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy

if TYPE_CHECKING:
    from onerec.training.alignment.config import AlignmentConfig
    from onerec.training.alignment.loop import AlignmentResult, align
    from onerec.training.batches import Batch, OrderedBatches, SessionBatches
    from onerec.training.config import TrainConfig
    from onerec.training.loop import TrainingInterrupted, TrainResult, pretrain
    from onerec.training.metrics import read_metrics
    from onerec.training.reward.config import RewardConfig
    from onerec.training.reward.train import RewardResult, train_reward
    from onerec.training.window import TrainingDiverged

_HOMES = {
    "AlignmentConfig": "onerec.training.alignment.config",
    "AlignmentResult": "onerec.training.alignment.loop",
    "Batch": "onerec.training.batches",
    "OrderedBatches": "onerec.training.batches",
    "SessionBatches": "onerec.training.batches",
    "RewardConfig": "onerec.training.reward.config",
    "RewardResult": "onerec.training.reward.train",
    "TrainConfig": "onerec.training.config",
    "TrainResult": "onerec.training.loop",
    "TrainingDiverged": "onerec.training.window",
    "TrainingInterrupted": "onerec.training.loop",
    "align": "onerec.training.alignment.loop",
    "pretrain": "onerec.training.loop",
    "read_metrics": "onerec.training.metrics",
    "train_reward": "onerec.training.reward.train",
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

__getattr__ = lazy(__name__, _HOMES)
