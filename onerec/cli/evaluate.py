"""`onerec evaluate`: the stage `evaluate`, metrics beside popularity and random."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.stage import StageResult, require, run_stage
from onerec.cli.verb import stage_verb


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/evaluate` from the trained model and the held-out sessions."""
    names = ["sessions", "tokenize", "pretrain"]
    if settings.data is None:
        names.append("world")
    inputs = {name: require(directory, name).fingerprint for name in names}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import SessionSet, World
        from onerec.evaluation import evaluate
        from onerec.inference import Recommender
        from onerec.tokenizer import Catalog

        catalog = Catalog.load(directory / "tokenize")
        recommender = Recommender.from_pretrained(directory / "pretrain" / "model", catalog)
        world = World.load(directory / "world") if settings.data is None else None
        with console.progress("evaluate") as report:
            result = evaluate(
                recommender,
                SessionSet.load(directory / "sessions"),
                settings.evaluate,
                world=world,
                progress=report,
            )
        result.save(folder / "evaluation.json")
        return headline(result)

    return run_stage(
        directory,
        "evaluate",
        config=asdict(settings.evaluate),
        inputs=inputs,
        code=["evaluation", "inference", "model", "ops", "cli/evaluate.py"],
        build=build,
        say=console.say,
    )


def headline(result: Any) -> dict[str, Any]:
    """The measures that a summary shows: the last split, history masked, with intervals."""
    split = result.protocol["splits"][-1]
    out: dict[str, Any] = {"split": split}
    for measure in result.measures:
        if measure.split == split and measure.history == "masked" and "[" not in measure.metric:
            out.setdefault(measure.metric, {})[measure.system] = [
                measure.value,
                measure.low,
                measure.high,
            ]
    return out


def main(argv: list[str]) -> None:
    stage_verb(
        "evaluate",
        "Measures the trained model on held-out sessions beside popularity and random, with "
        "bootstrap intervals, in OUT/evaluate.",
        argv,
        ["evaluate"],
        make,
    )
