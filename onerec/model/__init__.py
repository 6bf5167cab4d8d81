"""The networks: configuration, attention, mixture of experts, OneRec, reward model, SASRec.

Names are imported on first use, so that the configuration alone does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onerec.model.config import OneRecConfig, RewardModelConfig

if TYPE_CHECKING:
    from onerec.model.onerec import DecoderCache, Memory, OneRec, OneRecOutput, RouterStats
    from onerec.model.reward import RewardModel
    from onerec.model.sasrec import SASRec, SASRecConfig

_HOMES = {
    "DecoderCache": "onerec.model.onerec",
    "Memory": "onerec.model.onerec",
    "OneRec": "onerec.model.onerec",
    "OneRecOutput": "onerec.model.onerec",
    "RewardModel": "onerec.model.reward",
    "RouterStats": "onerec.model.onerec",
    "SASRec": "onerec.model.sasrec",
    "SASRecConfig": "onerec.model.sasrec",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
