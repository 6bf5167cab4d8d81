"""Logs in, sessions out: schema, readers, session building, the simulator."""

from onerec.data.readers import open_log
from onerec.data.session_set import Samples, SessionSet
from onerec.data.sessions import SessionConfig, build_sessions
from onerec.data.simulator import SimulatorConfig, World, simulate
from onerec.data.source import LogSource

__all__ = [
    "LogSource",
    "Samples",
    "SessionConfig",
    "SessionSet",
    "SimulatorConfig",
    "World",
    "build_sessions",
    "open_log",
    "simulate",
]
