"""Loads the native core once and says why when it cannot be loaded."""

from __future__ import annotations

from types import ModuleType

try:
    from onerec import _C as _module

    _problem: Exception | None = None
except Exception as error:  # a missing file, an undefined symbol or a broken toolchain alike
    _module = None  # type: ignore[assignment]
    _problem = error


def available() -> bool:
    """Whether the native core is loaded."""
    return _module is not None


def problem() -> str | None:
    """Why the native core could not be loaded, or None."""
    return None if _problem is None else f"{type(_problem).__name__}: {_problem}"


def core() -> ModuleType:
    """The native module `onerec._C`.

    Raises:
        RuntimeError: It could not be loaded; the message holds the reason.
    """
    if _module is None:
        raise RuntimeError(f"the native core onerec._C could not be loaded: {problem()}")
    return _module
