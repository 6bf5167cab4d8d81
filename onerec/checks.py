"""What settings are held to, and the words in which a wrong value is told.

Every message is "NAME: wanted ..., got ...". The range checks take names of fields of a dataclass
and are called in its `__post_init__`; a value that is NaN is in no range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def wanted(name: str, what: str, got: Any) -> ValueError:
    """The error of a wrong value.

    Args:
        name: The argument or field.
        what: What it can be, as in "at least 1".
        got: What it is.
    """
    return ValueError(f"{name}: wanted {what}, got {got!r}")


def at_least(config: Any, low: float, *names: str, finite: bool = False) -> None:
    """Refuses fields below `low`.

    Args:
        config: The dataclass.
        low: The least right value.
        *names: Its fields.
        finite: Refuse infinity too.
    """
    what = f"at least {low}" + (" and finite" if finite else "")
    for name in names:
        value = getattr(config, name)
        if not (low <= value and (value < math.inf or not finite)):
            raise wanted(name, what, value)


def at_least_or_none(config: Any, low: float, *names: str, finite: bool = False) -> None:
    """Refuses fields below `low` that are not None; arguments as `at_least`."""
    at_least(config, low, *(n for n in names if getattr(config, n) is not None), finite=finite)


def positive(config: Any, *names: str) -> None:
    """Refuses fields that are not above 0 or not finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise wanted(name, "more than 0 and finite", getattr(config, name))


def between(config: Any, low: float, high: float, *names: str, ends: str = "[]") -> None:
    """Refuses fields outside of an interval.

    Args:
        config: The dataclass.
        low: The interval's lower end.
        high: Its upper end.
        *names: Fields.
        ends: "[]" with both ends, "[)" without the upper one, "(]" without the lower one, "()"
            without either.
    """
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and (ends[0] == "[" or low < value)) or (
            ends[1] == ")" and value == high
        ):
            raise wanted(name, f"a value in {ends[0]}{low}, {high}{ends[1]}", value)


def fraction(config: Any, *names: str, ends: str = "[]") -> None:
    """Refuses fields outside of [0, 1]; `ends` as for `between`."""
    between(config, 0, 1, *names, ends=ends)


def one_of(config: Any, name: str, allowed: Sequence[Any]) -> None:
    """Refuses a field that is none of `allowed`."""
    value = getattr(config, name)
    if value not in allowed:
        raise wanted(name, f"one of {', '.join(map(repr, allowed))}", value)
