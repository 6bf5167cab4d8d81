"""Each range check refuses what is just outside of its range, and takes what is just inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from onerec.checks import at_least, at_least_or_none, between, fraction, one_of, positive

CASES: list[tuple[Callable[[Any], None], list[Any], list[Any], str]] = [
    (lambda c: at_least(c, 1, "a"), [1, 2, math.inf], [0, 0.99, -1, math.nan], "at least 1"),
    (
        lambda c: at_least(c, 0, "a", finite=True),
        [0, 1.5],
        [-0.1, math.inf, math.nan],
        "at least 0 and finite",
    ),
    (lambda c: at_least_or_none(c, 2, "a"), [None, 2], [1], "at least 2"),
    (lambda c: positive(c, "a"), [0.1, 1e300], [0, -1, math.inf, math.nan], "more than 0 and"),
    (lambda c: fraction(c, "a"), [0, 0.5, 1], [-0.1, 1.1, math.nan], r"a value in \[0, 1\]"),
    (lambda c: fraction(c, "a", ends="(]"), [0.1, 1], [0, 1.1], r"a value in \(0, 1\]"),
    (lambda c: fraction(c, "a", ends="[)"), [0, 0.9], [-0.1, 1], r"a value in \[0, 1\)"),
    (lambda c: between(c, 2, 3, "a", ends="()"), [2.5], [2, 3, math.nan], r"a value in \(2, 3\)"),
    (lambda c: one_of(c, "a", ("x", "y")), ["x", "y"], ["z", None], "one of 'x', 'y'"),
]


@pytest.mark.parametrize(("check", "right", "wrong", "what"), CASES, ids=[c[3] for c in CASES])
def test_ranges(
    check: Callable[[Any], None], right: list[Any], wrong: list[Any], what: str
) -> None:
    for value in right:
        check(SimpleNamespace(a=value))
    for value in wrong:
        with pytest.raises(ValueError, match=f"^a: wanted {what}.*, got {value!r}$"):
            check(SimpleNamespace(a=value))
