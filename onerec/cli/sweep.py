"""`onerec sweep`: settings tried one after another, compared on valid."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.cli.options import Parser
from onerec.pipeline.settings import SECTIONS
from onerec.pipeline.sweep import BEST, PAGE, Choice, sweep


def _flags(parser: Parser) -> None:
    parser.add_argument(
        "--try",
        dest="choices",
        nargs="+",
        type=str,
        required=True,
        metavar="NAME=VALUES",
        help="settings and their values: train.lr=1e-4..1e-2:log, model.d_model=32..128, "
        "model.dropout=0,0.1,0.3",
    )
    parser.add_argument("--trials", type=int, default=20, help="how many in all")
    parser.add_argument(
        "--metric", type=str, default="ndcg@10", help="recall@K, ndcg@K or hit@K, on valid"
    )
    parser.add_argument("--sampler_seed", type=int, default=0, help="of what is tried")


def main(argv: list[str]) -> None:
    command = parse_command(
        "sweep",
        "Tries settings with Optuna (extra sweep): each trial is a run in OUT/trials up to its "
        "evaluation on valid, and test takes no part. Writes OUT/sweep.html, sweep.json and "
        "best.yaml, which `onerec run --config` reads. The same command after a kill goes on; with "
        "more --trials it adds some.",
        argv,
        list(SECTIONS),
        data=True,
        stored=False,
        more=_flags,
    )
    more = command.more
    told = sweep(
        command.settings,
        [Choice.parse(text) for text in more["choices"]],
        command.out,
        metric=more["metric"] or "ndcg@10",
        trials=more["trials"] or 20,
        seed=more["sampler_seed"] or 0,
        listener=console.LISTENER,
    )
    if command.json:
        console.print_json({**told, "page": str(command.out / PAGE)})
        return
    console.stdout().print(trial_table(told))
    console.stdout().print(f"plots            {escape(str(command.out / PAGE))}")
    console.stdout().print(
        f"best settings    {escape(str(command.out / BEST))} (onerec run --config)"
    )


def trial_table(told: dict[str, Any]) -> Table:
    """The trials, best first."""
    names = [choice["name"] for choice in told["space"]]
    table = Table("trial", box=box.SIMPLE)
    for column in (f"{told['metric']}, valid", *names):
        table.add_column(column, justify="right", no_wrap=True)
    done = [row for row in told["trials"] if row["value"] is not None]
    for row in sorted(done, key=lambda row: -float(row["value"])):
        value = f"{row['value']:.4f}"
        cells = [row["settings"][name] for name in names]
        table.add_row(
            str(row["number"]),
            f"[bold]{value}[/]" if row["number"] == told["best"] else value,
            *(escape(f"{one:.4g}" if isinstance(one, float) else str(one)) for one in cells),
        )
    return table
