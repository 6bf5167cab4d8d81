"""`onerec evaluate`: the stage `evaluate`, metrics beside popularity and random."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.inputs import load_data, served_model
from onerec.cli.stage import StageResult, require, run_stage
from onerec.cli.verb import stage_verb


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/evaluate` from the trained model and the held-out sessions."""
    served = served_model(directory, settings)
    aligned = served.stage == "align"
    names = ["sessions", "tokenize", "pretrain"]
    if settings.data is None:
        names.append("world")
    if aligned:
        names += ["reward", "align"]
    inputs = {name: require(directory, name).fingerprint for name in names}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import World
        from onerec.evaluation import evaluate
        from onerec.inference import Recommender
        from onerec.model import RewardModel

        data, catalog = load_data(directory)
        models = {
            stage: Recommender.from_pretrained(directory / stage / "model", catalog, batching=True)
            for stage in dict.fromkeys(("pretrain", served.stage))
        }
        world = World.load(directory / "world") if settings.data is None else None
        judge = directory / "reward" / "judge"
        with console.progress("evaluate") as report:
            result = evaluate(
                models[served.stage],
                data,
                settings.evaluate,
                world=world,
                pretrained=models["pretrain"] if aligned else None,
                judge=RewardModel.from_pretrained(judge) if aligned and judge.is_dir() else None,
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
    """Every measure of the last split with the history masked, rare-item buckets left out.

    Returns:
        {"split": name, "measures": {metric: {system: [value, low, high]}}}; paired differences
        are systems such as "model - popularity".
    """
    split = result.protocol["splits"][-1]
    measures: dict[str, dict[str, list[float | None]]] = {}
    for one in (*result.measures, *result.differences):
        if one.split == split and one.history == "masked" and "[" not in one.metric:
            of_metric = measures.setdefault(one.metric, {})
            of_metric[one.system] = [one.value, one.low, one.high]
    return {"split": split, "measures": measures}


_COLUMNS = (
    "model",
    "pretrained",
    "popularity",
    "random",
    "oracle",
    "model - pretrained",
    "model - popularity",
)
_ROWS = (
    "recall@",
    "ndcg@",
    "hit@",
    "session_hit",
    "watch_seconds",
    "item_watch_seconds",
    "judged_reward",
    "coverage@",
)


def metric_table(summary: dict[str, Any]) -> Table:
    """The headline measures, and the model's lead over popularity with its interval."""
    measures: dict[str, dict[str, list[float | None]]] = summary["measures"]
    shown = {
        metric: systems
        for metric, systems in measures.items()
        if metric.startswith(_ROWS) and "model" in systems
    }
    columns = [c for c in _COLUMNS if any(c in systems for systems in shown.values())]
    if "pretrained" in columns:  # what alignment changed, instead of the lead over popularity
        columns.remove("model - popularity")
    table = Table(
        "metric", box=box.SIMPLE, title=f"{summary['split']} sessions", title_justify="left"
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for metric, systems in shown.items():
        table.add_row(metric, *(_cell(systems.get(column), "-" in column) for column in columns))
    return table


def _cell(measured: list[float | None] | None, difference: bool) -> str:
    value, low, high = measured or (None, None, None)
    if value is None:
        return ""
    if not difference:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    interval = "" if low is None or high is None else f" ({low:+.4f} .. {high:+.4f})"
    return f"{value:+.4f}{interval}"


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints the table and where the rest is."""
    console.stdout().print(metric_table(summary))
    console.stdout().print(f"all measures     {escape(str(folder / 'evaluation.json'))}")


def main(argv: list[str]) -> None:
    stage_verb(
        "evaluate",
        "Measures the trained model on held-out sessions beside popularity and random, with "
        "bootstrap intervals, in OUT/evaluate.",
        argv,
        ["evaluate"],
        make,
        show=show,
    )
