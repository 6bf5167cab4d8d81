"""Logs in, sessions out: schema, readers, session building, the simulator.

Names are imported on first use, so that the settings alone wait for neither pyarrow nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy
from onerec.data.config import SessionConfig, SimulatorConfig

if TYPE_CHECKING:
    from onerec.data.exposures import read_exposures
    from onerec.data.readers import open_log
    from onerec.data.session_set import ExposedSessions, Samples, SessionSet
    from onerec.data.sessions import build_sessions
    from onerec.data.simulator import World, simulate
    from onerec.data.source import LogSource

_HOMES = {
    "ExposedSessions": "onerec.data.session_set",
    "LogSource": "onerec.data.source",
    "Samples": "onerec.data.session_set",
    "SessionSet": "onerec.data.session_set",
    "World": "onerec.data.simulator",
    "build_sessions": "onerec.data.sessions",
    "open_log": "onerec.data.readers",
    "read_exposures": "onerec.data.exposures",
    "simulate": "onerec.data.simulator",
}

__all__ = [
    "ExposedSessions",
    "LogSource",
    "Samples",
    "SessionConfig",
    "SessionSet",
    "SimulatorConfig",
    "World",
    "build_sessions",
    "open_log",
    "read_exposures",
    "simulate",
]

__getattr__ = lazy(__name__, _HOMES)
