"""`onerec run`: the main job, every stage in order, each made only when it has to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

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
        list(SECTIONS),
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
    for name, module in (("evaluate", evaluate), ("recommend", recommend)):
        module.show(command.out / name, results[name].record.summary)
    console.stdout().print(f"report           {escape(str(report_path))}")
    console.say(f"run: {seconds:.0f} s")
