"""`onerec run`: the main job, every stage in order, each made only when it has to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

from onerec.cli import (
    align,
    console,
    evaluate,
    pretrain,
    recommend,
    report,
    reward,
    sessions,
    simulate,
    tokenize,
)
from onerec.cli.config import SECTIONS, Settings, parse_command
from onerec.cli.inputs import has_feedback
from onerec.cli.stage import StageResult, locked

STAGES: tuple[tuple[str, Callable[[Path, Settings], StageResult]], ...] = (
    ("world", simulate.make),
    ("sessions", sessions.make),
    ("tokenize", tokenize.make),
    ("pretrain", pretrain.make),
    ("reward", reward.make),
    ("align", align.make),
    ("evaluate", evaluate.make),
    ("recommend", recommend.make),
    ("report", report.make),
)


def _aligned(directory: Path, settings: Settings) -> bool:
    """Whether the run has a reward model and an alignment."""
    return settings.align.iterations > 0 and has_feedback(directory)


def main(argv: list[str]) -> None:
    command = parse_command(
        "run",
        "The main job: log -> sessions -> semantic ids -> pretraining -> reward model -> alignment "
        "-> evaluation -> recommendations -> report. A log without feedback has no reward model "
        "and no alignment. A stage whose inputs have not changed is skipped; an "
        "interrupted one goes on when the same command is given again.",
        argv,
        list(SECTIONS),
        data=True,
        stored=False,
    )
    begin = time.monotonic()
    results: dict[str, StageResult] = {}
    config = command.out / "config.yaml"
    with locked(command.out, "run"), command.settings.saved(config) as undo:
        for name, make in STAGES:
            if name == "world" and command.settings.data is not None:
                continue
            if name in ("reward", "align") and not _aligned(command.out, command.settings):
                continue
            result = results[name] = make(command.out, command.settings)
            if not result.skipped:  # the settings that it was made with stay, whatever fails later
                undo.pop_all()
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
    if not has_feedback(command.out):
        console.say("run: the log has no feedback columns: no reward model, no alignment")
    for name, show in (
        ("reward", reward.show),
        ("align", align.show),
        ("evaluate", evaluate.show),
        ("recommend", recommend.show),
    ):
        if name in results:
            show(command.out / name, results[name].record.summary)
    console.stdout().print(f"report           {escape(str(report_path))}")
    console.say(f"run: {seconds:.0f} s")
