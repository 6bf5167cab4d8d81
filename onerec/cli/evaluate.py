"""`onerec evaluate`: metrics beside popularity and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.verb import stage_verb

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
        show=show,
    )
