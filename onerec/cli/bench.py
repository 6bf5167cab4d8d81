"""`onerec bench`: runs the pytest-benchmark suites of a source tree and prints medians."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onerec
from onerec import environment
from onerec.cli import console
from onerec.errors import OneRecError

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def suites() -> dict[str, Path]:
    """Name -> file of each suite of the source tree that this package was installed from.

    Raises:
        OneRecError: There is no source tree, or no pytest-benchmark.
    """
    folder = Path(onerec.__file__).resolve().parent.parent / "benchmarks"
    found = {p.stem.removeprefix("bench_"): p for p in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise OneRecError(
            f"no benchmarks at {folder}: they are part of the source tree, not of the installed "
            'package; clone the repository, `pip install -e ".[dev]"` there, and run this again'
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise OneRecError('pytest-benchmark is not installed: `pip install -e ".[dev]"`')
    return found


# Suites that take far longer than the others run only by name.
LONG = frozenset({"alignment", "kmeans_large"})


def quick(known: Iterable[str]) -> list[str]:
    """The suites that run when none is named."""
    return [name for name in known if name not in LONG]


def duration(seconds: float) -> str:
    """A time with the unit that fits it."""
    for factor, unit in _UNITS:
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def measure(files: list[Path], *, gpu: bool) -> dict[str, Any]:
    """Runs suites in a pytest of their own.

    Args:
        files: Files of the suites.
        gpu: Whether the benchmarks that need a CUDA device run, or those that do not.

    Returns:
        The record, as JSON values: datetime, commit, environment, and for each benchmark what
        `compare` of benchmarks/conftest.py noted.

    Raises:
        OneRecError: A suite failed, or none has such a benchmark; pytest's words are on stderr.
    """
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "gpu" if gpu else "not gpu"]
        command += [f"--benchmark-json={record}", "--benchmark-quiet", *map(str, files)]
        root = files[0].parent.parent
        ended = subprocess.run(command, cwd=root, stdout=sys.stderr, check=False)
        if ended.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise OneRecError(f"pytest ended with code {ended.returncode}; see its output above")
        if not record.is_file():
            raise OneRecError(f"no benchmark {'for' if gpu else 'without'} a CUDA device has run")
        found = json.loads(record.read_text(encoding="utf-8"))
    return {
        "datetime": found["datetime"],
        "commit": {key: found["commit_info"].get(key) for key in ("id", "time", "dirty")},
        "environment": environment.published(),
        "benchmarks": [
            {
                "suite": Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_"),
                "name": entry["name"].removeprefix("test_"),
                **entry["extra_info"],
            }
            for entry in found["benchmarks"]
        ],
    }


def main(argv: list[str]) -> None:
    from onerec.cli.options import Parser

    if argv[:1] == ["quality"] or argv[:1] == ["ladder"]:
        importlib.import_module(f"onerec.cli.{argv[0]}").main(argv[1:])
        return
    parser = Parser(
        "bench",
        "Runs the benchmarks of a source tree; each checks its result before it is timed. "
        "`onerec bench quality` and `onerec bench ladder` train and compare recommenders instead, "
        "and have helps of their own.",
        usage="[SUITE ...] [options] | quality [options] | ladder [options]",
    )
    parser.add_argument(
        "suites",
        nargs="*",
        default=[],
        help="names of benchmarks/bench_NAME.py; by default all but the long ones "
        f"({', '.join(sorted(LONG))})",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="the benchmarks that need a CUDA device, and only those"
    )
    options = parser.parse(argv)
    known = suites()
    if unknown := [name for name in options.suites if name not in known]:
        parser.error(f"no suite {unknown[0]!r}; one of: {', '.join(known)}")
    chosen = options.suites or quick(known)
    record = measure([known[name] for name in chosen], gpu=options.gpu)
    if options.json:
        console.print_json(record)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("suite", "benchmark", "provider", box=None, pad_edge=False)
    for column in ("median", "p20 .. p80", "times ours"):
        table.add_column(column, justify="right")
    table.add_column("figures")
    for entry in record["benchmarks"]:
        facts = [f"{key} {value}" for key, value in entry["facts"].items()]
        ours = next(iter(entry["providers"].values()))["median_s"]
        for place, (provider, times) in enumerate(entry["providers"].items()):
            figures = [f"{rate:.3g} {unit}" for unit, rate in times["rates"].items()]
            table.add_row(
                entry["suite"] if place == 0 else "",
                escape(entry["name"]) if place == 0 else "",
                escape(provider),
                duration(times["median_s"]),
                f"{duration(times['p20_s'])} .. {duration(times['p80_s'])}",
                f"{times['median_s'] / ours:.2f}",
                escape(", ".join(figures + (facts if place == 0 else []))),
            )
    console.stdout().print(table)
