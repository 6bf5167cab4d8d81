"""`onerec run`: the main job."""

from __future__ import annotations

import time

from rich.markup import escape

from onerec import pipeline
from onerec.cli import align, console, evaluate, recommend, reward
from onerec.cli.command import parse_command
from onerec.pipeline import Inputs
from onerec.pipeline.recommend import FILE
from onerec.pipeline.settings import SECTIONS
from onerec.report.summary import advice


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
    results = pipeline.run(command.settings, command.out, console.LISTENER)
    seconds = time.monotonic() - begin
    report_path = command.out / "report" / "report.html"
    if command.json:
        console.print_json(
            {
                "out": str(command.out),
                "seconds": round(seconds, 3),
                "report": str(report_path),
                "recommendations": str(command.out / "recommend" / FILE),
                "next": advice(command.out),
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
    if not Inputs(command.out).has_feedback:
        console.say("run: the log has no feedback columns: no reward model, no alignment")
    elif "mixture" in results:
        console.say("run: items are ranked one by one: no reward model, no alignment of sessions")
    for name, show in (
        ("reward", reward.show),
        ("align", align.show),
        ("evaluate", evaluate.show),
        ("recommend", recommend.show),
    ):
        if name in results:
            show(command.out / name, results[name].record.summary)
    for line in advice(command.out):
        console.say(f"run: {line}")
    console.stdout().print(f"report           {escape(str(report_path))}")
    console.say(f"run: {seconds:.0f} s")
