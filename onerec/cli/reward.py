"""`onerec reward`: what users would do with a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.verb import stage_verb
from onerec.pipeline.reward import SYSTEMS


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
        show=show,
    )
