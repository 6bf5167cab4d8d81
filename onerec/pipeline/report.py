"""`onerec report`: the stage `report`, one HTML file about the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.inputs import alignment, reward_model
from onerec.cli.stage import StageResult, require, run_stage
from onerec.cli.verb import stage_verb


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/report/report.html` from the files of the stages before it."""
    names = ["sessions", "tokenize", "pretrain", "evaluate"]
    # Only those of this run, whatever its directory holds; alignment also where it changed nothing.
    optional = {
        "reward": reward_model(directory) is not None,
        "align": alignment(directory, settings) is not None,
    }
    names += [name for name, shown in optional.items() if shown]
    inputs = {name: require(directory, name).fingerprint for name in names}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.evaluation import render_report

        left_out = [name for name, shown in optional.items() if not shown]
        render_report(directory, folder / "report.html", leave_out=left_out)
        return {"report": str(directory / "report" / "report.html")}

    return run_stage(
        directory,
        "report",
        config={},
        inputs=inputs,
        code=["evaluation", "cli/report.py"],
        build=build,
        say=console.say,
    )


def main(argv: list[str]) -> None:
    stage_verb("report", "Writes OUT/report/report.html about the stages in OUT.", argv, [], make)
