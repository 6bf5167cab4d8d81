"""The stage `align`, iterative preference alignment of the pretrained model.

The unfinished stage keeps its checkpoints, so that the same command after a kill goes on from the
newest one. On many devices: `torchrun -m onerec align --out DIR`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, join_stage, run_stage
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `align` from the pretrained model, the reward model and the sessions."""
    return run_stage(
        inputs.directory,
        "align",
        **_described(settings, inputs, listener),
        say=listener.say,
        resumable=True,
        scratch=["checkpoints"],
    )


def _described(settings: Settings, inputs: Inputs, listener: Listener) -> dict[str, Any]:
    """The stage's configuration, inputs, code and build."""
    read = inputs.fingerprints("sessions", "tokenize", "pretrain", "reward")
    from onerec.training.alignment.config import FREE_ON_RESUME

    fixed = {k: v for k, v in asdict(settings.align).items() if k not in FREE_ON_RESUME}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.model import OneRec, RewardModel
        from onerec.training import align

        data, catalog = inputs.load()
        directory = inputs.directory
        model = OneRec.from_pretrained(directory / "pretrain" / "model")
        reward = RewardModel.from_pretrained(directory / "reward" / "model")
        with listener.progress("align") as report:
            result = align(
                model,
                reward,
                data.samples("train"),
                data.samples("valid"),
                catalog,
                settings.align,
                folder,
                progress=report,
            )
        seed = {k: v for k, v in result.record["seed"].items() if k != "rewards"}
        return {
            "method": settings.align.method,
            "iterations": result.iterations,
            "chosen": result.chosen,
            "stopped": result.stopped,
            "weight": result.record["weight"],
            "seed": seed,
            "rounds": [
                {k: v for k, v in one.items() if k != "rewards"}
                for one in result.record["iterations"]
            ],
        }

    return {
        "config": fixed,
        "inputs": read,
        "code": ["model", "training", "inference", "ops", "pipeline/align.py"],
        "build": build,
    }


def join(settings: Settings, inputs: Inputs, listener: Listener) -> None:
    """Takes part in a stage that the first process of the same launch makes."""
    join_stage(inputs.directory, "align", **_described(settings, inputs, listener))
