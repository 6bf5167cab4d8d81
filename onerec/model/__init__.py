"""The networks: configuration, attention, mixture of experts, OneRec, reward model, SASRec.

Names are imported on first use, so that the configuration alone does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy
from onerec.model.config import OneRecConfig, RewardModelConfig

if TYPE_CHECKING:
    from onerec.model.cache import DecoderCache, Memory
    from onerec.model.counting import CountRanker
    from onerec.model.onerec import OneRec
    from onerec.model.output import OneRecOutput, RouterStats
    from onerec.model.reward import RewardModel
    from onerec.model.sasrec import SASRec, SASRecConfig

_HOMES = {
    "CountRanker": "onerec.model.counting",
    "DecoderCache": "onerec.model.cache",
    "Memory": "onerec.model.cache",
    "OneRec": "onerec.model.onerec",
    "OneRecOutput": "onerec.model.output",
    "RewardModel": "onerec.model.reward",
    "RouterStats": "onerec.model.output",
    "SASRec": "onerec.model.sasrec",
    "SASRecConfig": "onerec.model.sasrec",
}

__all__ = [
    "CountRanker",
    "DecoderCache",
    "Memory",
    "OneRec",
    "OneRecConfig",
    "OneRecOutput",
    "RewardModel",
    "RewardModelConfig",
    "RouterStats",
    "SASRec",
    "SASRecConfig",
]

__getattr__ = lazy(__name__, _HOMES)
