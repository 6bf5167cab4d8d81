"""Runs the benchmarks, keeps their records and renders docs/benchmarks.md from them.

python benchmarks/results.py run [--gpu] [SUITE ...]   # -> benchmarks/results/<device>.json
python benchmarks/results.py render [--check]          # -> docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from onerec.cli import bench
from onerec.errors import OneRecError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

Rendered by `make docs` from the records in `benchmarks/results/`; no figure is typed by hand.
`make bench` (CPU) and `make gpu-check` (one CUDA device) write a record.

How it is measured: every provider's result is checked against the reference in the same run before
anything is timed; the providers of one line are timed in turn, one call of each a round, so that a
change of the machine's load meets all of them; a figure is the median over the rounds with its 20th
and 80th percentile. `x` is a provider's median over the first one's. Memory that can be reused
between calls is made outside the timing.
"""


def device(record: dict[str, Any]) -> str:
    """The machine of a record in words: its GPU if the benchmarks ran there, else its processor."""
    environment = record["environment"]
    if any(entry["device"] == "cuda" for entry in record["benchmarks"]):
        return str(environment["gpus"][0]["name"])
    cpu = environment["cpu"]
    return f"{cpu['name'].strip()}, {cpu['usable_cores']} cores, {environment['native']['isa']}"


def store(record: dict[str, Any]) -> Path:
    """Writes `record` to benchmarks/results/<device>.json; an older one of that device goes."""
    name = re.sub(r"[^a-z0-9]+", "-", device(record).lower()).strip("-")
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def section(record: dict[str, Any]) -> str:
    """The part of the page about one record."""
    environment, commit = record["environment"], record["commit"]
    packages = environment["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "numpy", "triton") if packages.get(name)
    )
    changed = " with uncommitted changes" if commit["dirty"] else ""
    lines = [
        f"\n## {device(record)}\n",
        f"onerec {environment['onerec']} at commit `{commit['id'][:10]}`{changed}, "
        f"{record['datetime'][:10]}; Python {environment['python']}, {versions}, "
        f"{environment['torch']['threads']} threads.",
    ]
    for suite in dict.fromkeys(entry["suite"] for entry in record["benchmarks"]):
        lines += [
            f"\n### {suite}\n",
            "| benchmark | provider | median | p20 .. p80 | x | figures |",
            "|---|---|---:|---:|---:|---|",
        ]
        for entry in record["benchmarks"]:
            if entry["suite"] != suite:
                continue
            ours = next(iter(entry["providers"].values()))["median_s"]
            for place, (provider, times) in enumerate(entry["providers"].items()):
                figures = [f"{rate:.3g} {unit}" for unit, rate in times["rates"].items()]
                if place == 0:
                    figures += [f"{key} {value}" for key, value in entry["facts"].items()]
                cells = (
                    entry["name"] if place == 0 else "",
                    provider,
                    bench.duration(times["median_s"]),
                    f"{bench.duration(times['p20_s'])} .. {bench.duration(times['p80_s'])}",
                    f"{times['median_s'] / ours:.2f}",
                    ", ".join(figures),
                )
                lines.append(
                    f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
                )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, from every record in benchmarks/results/."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return INTRODUCTION + "".join(section(record) for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure and keep the record of this device")
    run.add_argument("--gpu", action="store_true", help="what needs a CUDA device, and only that")
    run.add_argument("suites", nargs="*", help="names of bench_NAME.py; all by default")
    render = verbs.add_parser("render", help="write docs/benchmarks.md")
    render.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    if options.verb == "run":
        known = bench.suites()
        if unknown := set(options.suites) - set(known):
            parser.error(f"no suite {min(unknown)!r}; one of: {', '.join(known)}")
        files = [known[name] for name in options.suites or known]
        try:
            print(store(bench.measure(files, gpu=options.gpu)).relative_to(ROOT))
        except OneRecError as error:
            sys.exit(str(error))
    elif not options.check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what benchmarks/results/ gives: run `make docs`")


if __name__ == "__main__":
    main()
