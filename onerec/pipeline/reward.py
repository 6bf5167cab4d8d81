"""The stage `reward`, what users would do with a session."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.errors import OneRecError
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, run_stage
from onerec.progress import Listener

SYSTEMS = ("model", "judge", "logistic regression", "item mean")


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `reward` from the exposed sessions of the stage `sessions`."""

    def build(folder: Path) -> dict[str, Any]:
        import torch

        from onerec.data import SessionSet
        from onerec.training.reward.train import save_reward, train_reward

        data = SessionSet.load(inputs.directory / "sessions")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with listener.progress("reward") as report:
                result = train_reward(data, settings.reward, device=device, progress=report)
        except ValueError as error:
            raise OneRecError(
                f"no reward model: {error}; `onerec run` with --align.iterations 0 does without"
            ) from error
        save_reward(result, folder)
        return headline(result.metrics)

    return run_stage(
        inputs.directory,
        "reward",
        config=asdict(settings.reward),
        inputs=inputs.fingerprints("sessions"),
        code=[
            "model/reward.py",
            "model/config.py",
            "model/attention.py",
            "training/reward/train.py",
            "training/reward/config.py",
            "training/reward/metrics.py",
            "pipeline/reward.py",
        ],
        build=build,
        say=listener.say,
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
