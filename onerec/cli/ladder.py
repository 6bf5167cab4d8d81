"""`onerec bench ladder`: sizes, experts and sessions against true watch time, as one table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from onerec.cli import console
from onerec.cli.options import Parser
from onerec.experiments.ladder import Options, run


def show(record: dict[str, Any]) -> None:
    """Prints the table and the comparisons."""
    table = Table("rung", box=None, pad_edge=False)
    for column in ("parameters", "active", "MFLOP an item", "true seconds a session", "minutes"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        table.add_row(
            f"{row['size']} {'experts' if row['experts'] else 'dense'} {row['target']}",
            f"{row['parameters']:,.0f}",
            f"{row['active_parameters']:,.0f}",
            f"{row['flops'] / 1e6:.2f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*row["watch_seconds"]),
            f"{row['train_seconds'] / 60:.1f}",
        )
    console.stdout().print(table)
    for pair in record["pairs"]:
        console.stdout().print(
            f"{pair['claim']}: {pair['first']} - {pair['second']} "
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*pair["difference"])
        )


def main(argv: list[str]) -> None:
    """`onerec bench ladder`; called by the verb `bench`."""
    parser = Parser(
        "bench ladder",
        "Trains generators of three sizes, dense and with experts, on sessions and on next items "
        "of a simulated world, and values their sessions by the truth (docs/quality.md).",
        usage="[options]",
    )
    defaults = Options(Path("runs/ladder"))
    parser.add_argument("--out", type=str, default=str(defaults.out), help="folder of the runs")
    parser.add_argument("--rungs", nargs="*", default=[], help="names of rungs; all by default")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="trainings of each rung")
    parser.add_argument("--users", type=int, default=defaults.users, help="users of the world")
    parser.add_argument(
        "--epochs", type=float, default=defaults.epochs, help="passes over the training sessions"
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to train"
    )
    given = parser.parse(argv)
    parser.check_positive(given, "seeds", "users", "epochs")
    chosen = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    options = Options(**{**chosen, "out": Path(given.out), "rungs": tuple(given.rungs)})
    record = run(options, console.LISTENER)
    if given.json:
        console.print_json(record)
    else:
        show(record)
