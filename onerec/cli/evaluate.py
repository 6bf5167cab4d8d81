"""`onerec evaluate`: metrics beside baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.verb import stage_verb
from onerec.evaluation.result import best_systems, in_order

_COLUMNS = (
    "model",
    "pretrained",
    "SASRec",
    "count ranker",
    "popularity",
    "random",
    "oracle",
    "model - pretrained",
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

Measures = dict[str, dict[str, list[float | None]]]


def lead_table(summary: dict[str, Any]) -> Table:
    """Every system's Recall and NDCG at the last cut-off, and the model's lead over each."""
    measures: Measures = summary["measures"]
    metrics = [
        [name for name in measures if name.startswith(kind)][-1] for kind in ("recall@", "ndcg@")
    ]
    title = f"{summary['split']} sessions, history {summary['history']}"
    table = Table("system", box=box.SIMPLE, title=title, title_justify="left")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    table.add_column(f"model's lead, {metrics[0]}", justify="right", no_wrap=True)
    best = {metric: _best(metric, measures[metric]) for metric in metrics}
    for system in in_order(measures[metrics[0]]):
        cells = []
        for metric in metrics:
            value = _cell(measures[metric].get(system), False)
            cells.append(f"[bold]{value}[/]" if system in best[metric] else value)
        table.add_row(system, *cells, _lead(measures[metrics[0]], system))
    return table


def metric_table(summary: dict[str, Any]) -> Table:
    """The headline measures of the model and of those that it is compared with most."""
    measures: Measures = summary["measures"]
    shown = {
        metric: systems
        for metric, systems in measures.items()
        if metric.startswith(_ROWS) and "model" in systems
    }
    columns = [c for c in _COLUMNS if any(c in systems for systems in shown.values())]
    table = Table("metric", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for metric, systems in shown.items():
        best = _best(metric, systems)
        cells = []
        for column in columns:
            cell = _cell(systems.get(column), " - " in column)
            cells.append(f"[bold]{cell}[/]" if column in best else cell)
        table.add_row(metric, *cells)
    return table


def _lead(systems: dict[str, list[float | None]], other: str) -> str:
    """The model's lead over another system: in per cent, and with its interval."""
    lead, base = systems.get(f"model - {other}"), systems[other][0]
    if lead is None or lead[0] is None:
        return ""
    share = f"{100 * lead[0] / base:+.1f}%  " if base else ""
    return share + _cell(lead, True)


def _best(metric: str, systems: dict[str, list[float | None]]) -> set[str]:
    return best_systems(metric, {s: v[0] for s, v in systems.items() if " - " not in s})


def _cell(measured: list[float | None] | None, difference: bool) -> str:
    value, low, high = measured or (None, None, None)
    if value is None:
        return ""
    if not difference:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    interval = "" if low is None or high is None else f" ({low:+.4f} .. {high:+.4f})"
    return f"{value:+.4f}{interval}"


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints the tables and where the rest is."""
    console.stdout().print(lead_table(summary))
    console.stdout().print(metric_table(summary))
    console.stdout().print(f"all measures     {escape(str(folder / 'evaluation.json'))}")


def main(argv: list[str]) -> None:
    stage_verb(
        "evaluate",
        "Measures the trained model on held-out sessions beside popularity and counting "
        "baselines, with bootstrap intervals, in OUT/evaluate.",
        argv,
        ["evaluate"],
        show=show,
    )
