"""The stage `evaluate`, metrics beside baselines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.sasrec import sasrec_ranker
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, run_stage
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `evaluate` from the trained model and the held-out sessions."""
    directory = inputs.directory
    served = inputs.served_model(settings)
    aligned = served.stage == "align"
    names = ["sessions", "tokenize", "pretrain"]
    if settings.data is None:
        names.append("world")
    if aligned:
        names += ["reward", "align"]
    trained = ["training", "pipeline/sasrec.py"] if settings.evaluate.sasrec else []
    if inputs.ranks_items(settings):
        names.append("mixture")

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import World
        from onerec.evaluation import evaluate
        from onerec.model import RewardModel

        data, catalog = inputs.load()
        mixture = inputs.mixture(settings)
        models = {
            stage: inputs.recommender(stage, catalog, mixture)
            for stage in dict.fromkeys(("pretrain", served.stage))
        }
        world = World.load(directory / "world") if settings.data is None else None
        judge = directory / "reward" / "judge"
        others = {}
        if settings.evaluate.sasrec:
            with listener.progress("SASRec") as report:
                others["SASRec"] = sasrec_ranker(
                    data,
                    folder / "sasrec",
                    seed=settings.evaluate.seed,
                    device=settings.train.device,
                    num_threads=settings.train.num_threads,
                    progress=report,
                )
        with listener.progress("evaluate") as report:
            result = evaluate(
                models[served.stage],
                data,
                settings.evaluate,
                world=world,
                pretrained=models["pretrain"] if aligned else None,
                judge=RewardModel.from_pretrained(judge) if aligned and judge.is_dir() else None,
                others=others,
                exclude_history=data.exclude_history,
                progress=report,
            )
        result.save(folder / "evaluation.json")
        pq.write_table(result.rows, folder / "rows.parquet")
        return headline(result)

    return run_stage(
        directory,
        "evaluate",
        config=asdict(settings.evaluate),
        inputs=inputs.fingerprints(*names),
        code=["evaluation", "inference", "model", "ops", "pipeline/evaluate.py", *trained],
        build=build,
        say=listener.say,
        resumable=settings.evaluate.sasrec,
    )


def headline(result: Any) -> dict[str, Any]:
    """Every measure of the last split, the history as it is served, rare-item buckets left out.

    Returns:
        {"split": name, "history": "masked" or "unmasked", "measures": {metric: {system: [value,
        low, high]}}}; paired differences are systems such as "model - popularity".
    """
    split, history = result.protocol["splits"][-1], result.protocol["served"]
    measures: dict[str, dict[str, list[float | None]]] = {}
    for one in (*result.measures, *result.differences):
        if one.split == split and one.history == history and "[" not in one.metric:
            of_metric = measures.setdefault(one.metric, {})
            of_metric[one.system] = [one.value, one.low, one.high]
    return {"split": split, "history": history, "measures": measures}
