"""`onerec reward`: the stage `reward`, what users would do with a session."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.stage import StageResult, require, run_stage
from onerec.cli.verb import stage_verb
from onerec.errors import OneRecError

SYSTEMS = ("model", "judge", "logistic regression", "item mean")


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/reward` from the exposed sessions of `directory/sessions`."""
    sessions = require(directory, "sessions")

    def build(folder: Path) -> dict[str, Any]:
        import torch

        from onerec.data import SessionSet
        from onerec.training.reward.train import save_reward, train_reward

        data = SessionSet.load(directory / "sessions")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with console.progress("reward") as report:
                result = train_reward(data, settings.reward, device=device, progress=report)
        except ValueError as error:
            raise OneRecError(
                f"no reward model: {error}; `onerec run` with --align.iterations 0 does without"
            ) from error
        save_reward(result, folder)
        return headline(result.metrics)

    return run_stage(
        directory,
        "reward",
        config=asdict(settings.reward),
        inputs={"sessions": sessions.fingerprint},
        code=[
            "model/reward.py",
            "model/config.py",
            "model/attention.py",
            "training/reward/train.py",
            "training/reward/config.py",
            "training/reward/metrics.py",
            "cli/reward.py",
        ],
        build=build,
        say=console.say,
    )


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The test split's AUC of every system, and the model's loss and calibration.

    Returns:
        {"targets", "left_out", "split", "measures": {target: {"auc": {system: value}, ...}}}.
    """
    split = "test"
    measures: dict[str, Any] = {}
    for target, row in metrics["splits"][split].items():
        found = {system: row[system] for system in SYSTEMS if system in row}
        measures[target] = {
            "rows": row["rows"],
            "positives": row["positives"],
            "auc": {system: one["auc"] for system, one in found.items()},
            "log_loss": {system: one["log_loss"] for system, one in found.items()},
            "calibration_ratio": {
                system: one["calibration"]["ratio"] for system, one in found.items()
            },
        }
    return {
        "targets": len(metrics["targets"]),
        "left_out": metrics["skipped"],
        "split": split,
        "measures": measures,
    }


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints the AUC of each target beside the plain predictors."""
    table = Table(
        "AUC", box=box.SIMPLE, title=f"reward model, {summary['split']} split", title_justify="left"
    )
    systems = [s for s in SYSTEMS if any(s in row["auc"] for row in summary["measures"].values())]
    for system in (*systems, "log loss", "predicted / observed"):
        table.add_column(system, justify="right", no_wrap=True)
    for target, row in summary["measures"].items():
        cells = [f"{row['auc'][s]:.4f}" if s in row["auc"] else "" for s in systems]
        extra = [row["log_loss"].get("model"), row["calibration_ratio"].get("model")]
        table.add_row(target, *cells, *("" if x is None else f"{x:.4f}" for x in extra))
    console.stdout().print(table)
    for target, why in summary["left_out"].items():
        console.stdout().print(escape(f"{target:16} not trained: {why}"))
    console.stdout().print(f"all measures     {escape(str(folder / 'metrics.json'))}")


def main(argv: list[str]) -> None:
    stage_verb(
        "reward",
        "Trains the reward model on what was shown, measures it beside a logistic regression and "
        "item means, in OUT/reward. Needs a log with feedback columns.",
        argv,
        ["reward"],
        make,
        show=show,
    )
