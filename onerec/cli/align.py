"""`onerec align`: iterative preference alignment of the pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.cli.verb import stage_verb
from onerec.pipeline import Inputs
from onerec.pipeline.align import join
from onerec.pipeline.stage import rank

_COLUMNS = (
    ("groups", "pairs"),
    ("candidates_per_s", "candidates/s"),
    ("reward_best", "reward"),
    ("win_rate", "wins"),
    ("winner_change", "winner, nats"),
    ("legality", "legality"),
    ("drift_seed", "drift, nats"),
    ("loss", "loss"),
)


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints what each iteration did."""
    table = Table(
        "iteration", box=box.SIMPLE, title=f"alignment, {summary['method']}", title_justify="left"
    )
    for _, name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate([summary["seed"], *summary["rounds"]]):
        cells = [row.get(key) for key, _ in _COLUMNS]
        mark = " *" if number == summary["chosen"] else ""
        table.add_row(
            f"{number or 'seed'}{mark}",
            *("" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.4g}" for x in cells),
        )
    console.stdout().print(table)
    if stale := max((row.get("stale_steps", 0) for row in summary["rounds"]), default=0):
        waited = sum(row["waited_s"] for row in summary["rounds"])
        console.stdout().print(
            f"asynchronous     candidates {stale} steps old, {waited:.1f} s waited"
        )
    if summary["stopped"]:
        console.stdout().print(escape(f"ended early      {summary['stopped']}"), soft_wrap=True)
    same = "" if summary["chosen"] else ", the pretrained model as it was"
    console.stdout().print(f"* chosen         {escape(str(folder / 'model'))}{same}")


def main(argv: list[str]) -> None:
    if rank():
        command = parse_command("align", "", argv, ["align"])
        join(command.settings, Inputs(command.out), console.LISTENER)
        return
    stage_verb(
        "align",
        "Aligns the pretrained model with the reward model, in OUT/align: candidates by session "
        "beam search, winners and losers, preference loss beside next-token training. The same "
        "command after a kill goes on from the newest checkpoint. On several devices: torchrun "
        "--nproc-per-node N -m onerec align --out DIR.",
        argv,
        ["align"],
        show=show,
    )
