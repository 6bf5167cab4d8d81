"""The network: configuration, attention, mixture of experts, OneRec.

Names are imported on first use, so that the configuration alone does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onerec.model.config import OneRecConfig

if TYPE_CHECKING:
    from onerec.model.onerec import DecoderCache, Memory, OneRec, OneRecOutput, RouterStats

_HOMES = {
    "DecoderCache": "onerec.model.onerec",
    "Memory": "onerec.model.onerec",
    "OneRec": "onerec.model.onerec",
    "OneRecOutput": "onerec.model.onerec",
    "RouterStats": "onerec.model.onerec",
}

__all__ = ["DecoderCache", "Memory", "OneRec", "OneRecConfig", "OneRecOutput", "RouterStats"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
