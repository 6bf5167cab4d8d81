"""`onerec run`: the main job, every stage in order, each made only when it has to be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from onerec.cli import (
    console,
    evaluate,
    pretrain,
    recommend,
    report,
    sessions,
    simulate,
    tokenize,
)
from onerec.cli.config import SECTIONS, Settings, parse_command
from onerec.cli.stage import StageResult, locked

STAGES: tuple[tuple[str, Callable[[Path, Settings], StageResult]], ...] = (
    ("world", simulate.make),
    ("sessions", sessions.make),
    ("tokenize", tokenize.make),
    ("pretrain", pretrain.make),
    ("evaluate", evaluate.make),
    ("recommend", recommend.make),
    ("report", report.make),
)


def main(argv: list[str]) -> None:
    command = parse_command(
        "run",
        "The main job: log -> sessions -> semantic ids -> pretraining -> evaluation -> "
        "recommendations -> report. A stage whose inputs have not changed is skipped; an "
        "interrupted one goes on when the same command is given again.",
        argv,
        SECTIONS,
        data=True,
        stored=False,
    )
    begin = time.monotonic()
    results: dict[str, StageResult] = {}
    with locked(command.out, "run"):
        command.settings.save(command.out / "config.yaml")
        for name, make in STAGES:
            if name == "world" and command.settings.data is not None:
                continue
            results[name] = make(command.out, command.settings)
    seconds = time.monotonic() - begin
    report_path = command.out / "report" / "report.html"
    if command.json:
        console.print_json(
            {
                "out": str(command.out),
                "seconds": round(seconds, 3),
                "report": str(report_path),
                "recommendations": str(command.out / "recommend" / recommend.FILE),
                "stages": {
                    name: {
                        "skipped": result.skipped,
                        "seconds": result.record.seconds,
                        **result.record.summary,
                    }
                    for name, result in results.items()
                },
            }
        )
        return
    out = console.stdout()
    examples = json.loads((command.out / "recommend" / recommend.EXAMPLES).read_text())
    out.print(metric_table(results["evaluate"].record.summary))
    out.print(recommend.examples_table(examples))
    out.print(f"recommendations  {escape(str(command.out / 'recommend' / recommend.FILE))}")
    out.print(f"report           {escape(str(report_path))}")
    console.say(f"run: {seconds:.0f} s")


def metric_table(summary: dict[str, Any]) -> Table:
    """Metrics by system, with intervals."""
    metrics = {k: v for k, v in summary.items() if isinstance(v, dict)}
    systems = list(dict.fromkeys(s for by_system in metrics.values() for s in by_system))
    table = Table("metric", title=f"{summary['split']} sessions", title_justify="left")
    for system in systems:
        table.add_column(system, justify="right")
    for metric, by_system in metrics.items():
        table.add_row(metric, *(_cell(by_system.get(system)) for system in systems))
    return table


def _cell(measured: list[float | None] | None) -> str:
    if measured is None or measured[0] is None:
        return "-"
    value, low, high = measured
    return f"{value:.4f}" if low is None else f"{value:.4f} [dim]({low:.4f} .. {high:.4f})[/dim]"
