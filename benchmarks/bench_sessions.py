"""Session building at scale: a simulated log of N rows, its time and its peak memory.

    python benchmarks/bench_sessions.py --rows 10000000

Prints one JSON object. The log is simulated first, in a process of its own, so that the peak
resident memory is that of opening the log and building the sessions alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any


def simulate(folder: Path, rows: int, seed: int) -> None:
    """Writes a world whose log has about `rows` rows."""
    from onerec.data import SimulatorConfig
    from onerec.data import simulate as make

    # A request shows 6.5 rows on average, a user sends 28 of them.
    users = max(1, round(rows / (6.5 * 28)))
    make(
        SimulatorConfig(n_users=users, n_items=20_000, n_creators=2_000, candidates=8, seed=seed)
    ).write(folder)


def build(folder: Path, out: Path, rule: str, threads: int, memory: str, pipe: Any) -> None:
    """Builds sessions and sends what was measured."""
    import torch

    torch.set_num_threads(threads)
    from onerec.data import SessionConfig, build_sessions, open_log

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begin, cpu = time.perf_counter(), time.process_time()
    with open_log(folder, memory_limit=memory) as log:
        opened = time.perf_counter()
        found = build_sessions(log, SessionConfig(rule=rule), out)
    end = time.perf_counter()
    steps = {step["step"]: step["count"] for step in found.funnel["steps"]}
    # The figure counts only if what was built is right.
    sample = found.samples("test")
    assert steps["rows in the log"] == steps["rows with a known item"]
    assert sum(found.funnel["sessions"].values()) == found.sessions.num_rows
    assert all(len(sample.history(i)) >= 1 for i in range(0, len(sample), 997))
    pipe.send(
        {
            "open_s": round(opened - begin, 2),
            "build_s": round(end - opened, 2),
            "total_s": round(end - begin, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "peak_after_import_gib": round(imported, 2),
            "steps": steps,
            "sessions": found.funnel["sessions"],
        }
    )


def main() -> None:
    """Runs both parts and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rule", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the simulated log here and use it again")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        log = given.log or Path(scratch) / "log"
        begin = time.perf_counter()
        if not (log / "interactions.parquet").exists():
            part = context.Process(target=simulate, args=(log, given.rows, given.seed))
            part.start()
            part.join()
        simulated = time.perf_counter() - begin
        ours, theirs = context.Pipe()
        part = context.Process(
            target=build,
            args=(
                log,
                Path(scratch) / "out",
                given.rule,
                given.threads,
                given.memory_limit,
                theirs,
            ),
        )
        part.start()
        theirs.close()
        measured = ours.recv()
        part.join()
    print(
        json.dumps(
            {
                "cpu": platform.processor() or platform.machine(),
                "threads": given.threads,
                "memory_limit": given.memory_limit,
                "rule": given.rule,
                "simulate_s": round(simulated, 1),
                **measured,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
