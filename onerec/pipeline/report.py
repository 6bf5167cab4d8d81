"""The stage `report`, one HTML file about the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import STAGES, StageResult, file_digest, run_stage
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `report` from the files of the stages before it."""
    directory = inputs.directory
    names = ["sessions", "tokenize", "pretrain", "evaluate"]
    # Only those of this run, whatever its directory holds; alignment also where it changed nothing.
    optional = {
        "reward": inputs.reward_model() is not None,
        "align": inputs.alignment(settings) is not None,
    }
    names += [name for name, shown in optional.items() if shown]
    read = inputs.fingerprints(*names)
    if (lines := directory / "updates.jsonl").is_file():
        read["updates"] = file_digest(lines)

    def build(folder: Path) -> dict[str, Any]:
        from onerec.report import render_report

        left_out = [name for name, shown in optional.items() if not shown]
        stages = [name for name in STAGES if name != "report"]
        render_report(directory, folder / "report.html", stages=stages, leave_out=left_out)
        return {"report": str(directory / "report" / "report.html")}

    return run_stage(
        directory,
        "report",
        config={},
        inputs=read,
        code=["report", "evaluation/result.py", "training/metrics.py", "pipeline/report.py"],
        build=build,
        say=listener.say,
    )
