"""Shared habits of the benchmarks: a checked result first, providers in turn, medians with spread.

    def test_assign(compare, items):
        compare(
            {"ours": lambda: assign(x, c), "reference": lambda: assign_reference(x, c)},
            check=lambda result, expected: torch.testing.assert_close(result, expected),
            work={"GB/s": x.nbytes / 1e9},
        )

The first provider is the one under test; `onerec bench` and `make bench` print and store the rest
beside it, with the machine, the versions and the commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

POLLING = 0.015  # seconds; libgomp's threads poll for 8 ms after a parallel region of torch's
WARM = 0.002  # seconds of calls before timing; nothing beside a call ten times as long


class Comparison:
    """Times providers of one result in turn; see `__call__`."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        providers: Mapping[str, Callable[[], Any]],
        *,
        check: Callable[[Any, Any], None],
        expected: Any = None,
        work: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        calls: int = 1,
        steps: int = 1,
        seconds: float = 2.0,
        device: str = "cpu",
    ) -> None:
        """Checks every provider's result, then times them in turn, one call of each a round.

        Another provider than the first whose result is wrong, or that cannot be called, is left
        out and named in the record; the test fails once the others are timed.

        On the CPU each turn begins once the threads of the one before have stopped polling, which
        would take a core from it, and its own are awake.

        Args:
            providers: Name -> call that takes nothing and returns its result; ours first. Memory
                that a provider can reuse (`out=`, workspaces) is made outside; what must be done
                anew before each call but is not to be timed, in a `prepare` method of it.
            check: Called as `check(result, expected)` for each provider before any timing; must
                raise if the result is wrong.
            expected: The right result; default: what the last provider returns (put a reference
                there). One of the two must be given: `expected`, or two providers or more.
            work: Unit -> amount that one call does, in that unit times seconds (for "GB/s" the
                gigabytes that it must move); stored as a rate at each provider's median.
            facts: Anything else for the record, e.g. a relative error or a beam width; a call that
                gives it is made after the timing.
            calls: Calls in one round, for calls of microseconds; times are stored per call.
            steps: Equal parts that a call consists of; times are stored per part.
            seconds: Time to spend in all, 5 rounds at least and 200 at most.
            device: On "cuda" a round ends with a synchronisation.
        """
        names = list(providers)
        if expected is None and len(names) < 2:
            raise ValueError("compare: wanted `expected` or a second provider to check against")
        if expected is None:
            expected = providers[names[-1]]()
        wrong: dict[str, str] = {}
        for name, provider in providers.items():
            try:
                getattr(provider, "prepare", lambda: None)()
                check(provider(), expected)
            except Exception as error:
                if name == names[0]:
                    raise
                wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        names = [name for name in names if name not in wrong]

        def timed(call: Callable[[], Any], count: int) -> float:
            prepare = getattr(call, "prepare", None)
            spent = 0.0
            for group in [1] * count if prepare else [count]:
                if prepare:
                    prepare()
                start = time.perf_counter()
                for _ in range(group):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                spent += time.perf_counter() - start
            return spent

        def once(call: Callable[[], Any]) -> float:
            if device == "cpu":
                time.sleep(POLLING)
                spent = 0.0
                while spent < WARM:
                    first = timed(call, 1)
                    spent += first
                if calls == 1 and first > 10 * WARM:
                    return first
            return timed(call, calls)

        if self._benchmark.disabled:
            self._benchmark.pedantic(once, args=(providers[names[0]],))
            assert not wrong, f"wrong: {wrong}"
            return
        begin = time.perf_counter()
        for name in names:
            once(providers[name])
        rounds = int(np.clip(seconds / (time.perf_counter() - begin), 5, 200))
        times: dict[str, list[float]] = {name: [] for name in names}

        # Untimed by pytest-benchmark, so the others' turns come before each round of ours; their
        # order moves on by one each time.
        def others() -> None:
            turn = len(times[names[-1]]) % max(len(names) - 1, 1)
            for name in names[1 + turn :] + names[1 : 1 + turn]:
                times[name].append(once(providers[name]))

        def ours() -> None:
            times[names[0]].append(once(providers[names[0]]))

        self._benchmark.pedantic(ours, setup=others, rounds=rounds)
        self._benchmark.extra_info.update(
            device=device,
            rounds=rounds,
            facts={},
            providers={
                name: _summary(np.asarray(times[name]) / (calls * steps), work or {})
                for name in names
            },
        )
        if wrong:
            self._benchmark.extra_info["wrong"] = wrong
        found = facts() if callable(facts) else facts
        self._benchmark.extra_info["facts"] = dict(found or {})
        assert not wrong, f"wrong: {wrong}"

    def alone(
        self,
        providers: Mapping[str, Callable[[], Mapping[str, float]]],
        *,
        facts: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        """Records long runs, one call of each provider, that check and time themselves.

        Args:
            providers: Name -> call that works in a process of its own, so that its peak memory is
                its own too, and returns figures with their units for names: "seconds", and what
                else there is to say ("peak MiB", "objective"); ours first.
            facts: As above.
            device: As above.
        """
        names = list(providers)
        if self._benchmark.disabled:
            self._benchmark.pedantic(providers[names[0]])
            return
        figures = {names[0]: self._benchmark.pedantic(providers[names[0]])}
        figures.update({name: providers[name]() for name in names[1:]})
        self._benchmark.extra_info.update(
            device=device,
            rounds=1,
            facts=dict(facts or {}),
            providers={
                name: {
                    **_summary(np.asarray([found["seconds"]]), {}),
                    "rates": {unit: v for unit, v in found.items() if unit != "seconds"},
                }
                for name, found in figures.items()
            },
        )


def _summary(seconds: np.ndarray, work: Mapping[str, float]) -> dict[str, Any]:
    p20, median, p80, p99 = (float(v) for v in np.percentile(seconds, (20, 50, 80, 99)))
    rates = {unit: amount / median for unit, amount in work.items()}
    return {"median_s": median, "p20_s": p20, "p80_s": p80, "p99_s": p99, "rates": rates}


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Comparison:
    """Times providers side by side; the only way that a benchmark here measures."""
    return Comparison(benchmark)
